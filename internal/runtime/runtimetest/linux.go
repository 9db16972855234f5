package runtimetest

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
)

// Linux is the suite for implementations that run real programs on a real kernel,
// with BusyboxImage as the layer.
func Linux(t *testing.T, tg Target) {
	for _, c := range []struct {
		name string
		fn   func(*testing.T, Target)
	}{
		{"isolation", testIsolation}, {"users", testUsers}, {"environment", testEnvironment}, {"capabilities", testCapabilities},
		{"security", testSecurity}, {"read-only", testReadOnly}, {"files", testFiles}, {"volume", testVolume},
		{"subpath", testSubpath}, {"tmpfs and devices", testTmpfsDevices}, {"limits", testLimits}, {"out of memory", testOOM},
		{"stop", testStop}, {"terminal", testTerminal}, {"exec users", testExecUsers}, {"log shapes", testLogShapes},
		{"writable layer", testWritableLayer}, {"attach tells", testAttachTells}, {"privileged", testPrivileged}, {"ulimits", testUlimits},
	} {
		t.Run(c.name, func(t *testing.T) { c.fn(t, tg) })
	}
}

func sh(tg Target, script string) *v1.RuntimeSpec { return Spec(tg.Layer, "sh", "-c", script) }

// contains runs a script and wants each of the lines in its output.
func contains(t *testing.T, tg Target, s *v1.RuntimeSpec, want ...string) string {
	t.Helper()
	code, out := run(t, tg, s)
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	lines := strings.Split(out, "\n")
	for _, w := range want {
		if !slices.Contains(lines, w) {
			t.Errorf("no line %q in:\n%s", w, out)
		}
	}
	return out
}

func testIsolation(t *testing.T, tg Target) {
	s := sh(tg, `echo pid $$; hostname; cat /etc/hostname; ls /sys/class/net; cat /run/kept; df -k /dev/shm | tail -1 | awk '{print $2}'; cat /proc/sys/net/ipv4/ip_unprivileged_port_start`)
	s.Hostname, s.ShmSizeBytes = "web", 8<<20
	s.ExtraHosts = []string{"db:10.1.2.3"}
	out := contains(t, tg, s, "pid 1", "web", "image content below /run", "8192", "lo", "0")
	if strings.Contains(out, "eth") {
		t.Errorf("a network of the host is visible:\n%s", out)
	}
	s = sh(tg, `cat /etc/hosts /etc/resolv.conf`)
	s.ExtraHosts = []string{"db:10.1.2.3", "six:[::1]"}
	s.Network = &v1.RuntimeNetwork{Mode: "none", DnsServers: []string{"169.254.1.1"}, DnsSearch: []string{"shop"}, DnsOptions: []string{"ndots:0"}}
	contains(t, tg, s, "10.1.2.3\tdb", "::1\tsix", "nameserver 169.254.1.1", "search shop", "options ndots:0")
}

func testUsers(t *testing.T, tg Target) {
	s := sh(tg, `id -u; id -g; id -G; echo $HOME; touch /home/app/x && echo wrote; touch /etc/x || echo refused`)
	s.User = "app"
	contains(t, tg, s, "1000", "1000 2000", "/home/app", "wrote", "refused")
	s = sh(tg, `id -u; id -g; id -G`)
	s.User, s.GroupAdd = "1234:extra", []string{"app", "77"}
	contains(t, tg, s, "1234", "2000", "2000 77 1000")
	s = sh(tg, "true")
	s.User = "nobody-here"
	if err := tg.RT.Create(Context(t), s); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown user: %v", err)
	}
	if st := status(t, tg, s.Id); st != nil {
		t.Errorf("a failed create left %v", st)
	}
}

func testEnvironment(t *testing.T, tg Target) {
	s := sh(tg, `pwd; env; echo "$EMPTY."`)
	s.Env, s.Cwd = []string{"A=1", "A=2", "PATH=/bin", "EMPTY=", "SPACE=a b"}, "/made/on/the/way"
	out := contains(t, tg, s, "/made/on/the/way", "A=2", "PATH=/bin", "SPACE=a b", "HOME=/root", ".")
	if strings.Contains(out, "TERM=") || strings.Contains(out, "A=1\n") {
		t.Errorf("environment:\n%s", out)
	}
}

func testCapabilities(t *testing.T, tg Target) {
	eff := func(add, drop []string) string {
		s := sh(tg, `grep CapEff /proc/self/status | cut -f2; grep CapBnd /proc/self/status | cut -f2`)
		s.CapAdd, s.CapDrop = add, drop
		_, out := run(t, tg, s)
		return out
	}
	if got := eff(nil, nil); got != strings.Repeat("00000000a80425fb\n", 2) {
		t.Errorf("default: %s", got)
	}
	if got := eff(nil, []string{"ALL"}); got != strings.Repeat("0000000000000000\n", 2) {
		t.Errorf("drop ALL: %s", got)
	}
	if got := eff([]string{"net_admin"}, []string{"all"}); got != strings.Repeat("0000000000001000\n", 2) {
		t.Errorf("drop ALL, add NET_ADMIN: %s", got)
	}
	if got := eff(nil, []string{"CAP_CHOWN"}); got != strings.Repeat("00000000a80425fa\n", 2) {
		t.Errorf("drop CHOWN: %s", got)
	}
	s := sh(tg, "true")
	s.CapAdd = []string{"FLY"}
	if err := tg.RT.Create(Context(t), s); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown capability: %v", err)
	}
}

func testSecurity(t *testing.T, tg Target) {
	s := sh(tg, `grep -E 'Seccomp:|NoNewPrivs' /proc/self/status | tr '\t' ' '; unshare -U true 2>/dev/null || echo no-userns; cat /proc/kcore | wc -c; echo 1 2>/dev/null > /proc/sys/kernel/panic || echo ro; mount -t tmpfs x /tmp 2>/dev/null || echo no-mount; cat /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/pids/cgroup.procs 2>/dev/null | head -1`)
	s.SecurityOpt = []string{"no-new-privileges"}
	contains(t, tg, s, "Seccomp: 2", "NoNewPrivs: 1", "no-userns", "0", "ro", "no-mount", "1")
	s = sh(tg, `grep -E 'Seccomp:' /proc/self/status | tr '\t' ' '`)
	s.SecurityOpt = []string{"seccomp=unconfined"}
	contains(t, tg, s, "Seccomp: 0")
	s = sh(tg, `mkdir /tmp/a 2>/dev/null || echo denied`)
	s.SecurityOpt = []string{`seccomp={"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}`}
	contains(t, tg, s, "denied")
	// Rules by argument, by what the container may do and by the kernel's age.
	s = sh(tg, `mkdir /tmp/a && echo made; chmod 755 /tmp/a && echo changed; chmod 4755 /tmp/a 2>/dev/null || echo no-setuid; ln -s a /tmp/b 2>/dev/null || echo no-link; sync && echo synced`)
	s.SecurityOpt = []string{`seccomp={"defaultAction":"SCMP_ACT_ALLOW","archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]},{"architecture":"SCMP_ARCH_AARCH64"}],"syscalls":[
		{"names":["chmod"],"action":"SCMP_ACT_ERRNO","args":[{"index":1,"value":2048,"valueTwo":2048,"op":"SCMP_CMP_MASKED_EQ"}]},
		{"names":["fchmodat"],"action":"SCMP_ACT_ERRNO","args":[{"index":2,"value":2048,"valueTwo":2048,"op":"SCMP_CMP_MASKED_EQ"}]},
		{"names":["symlink","symlinkat"],"action":"SCMP_ACT_ERRNO","errnoRet":13,"includes":{"minKernel":"3.0"},"excludes":{"caps":["CAP_SYS_ADMIN"]}},
		{"names":["sync"],"action":"SCMP_ACT_KILL_PROCESS","includes":{"caps":["CAP_SYS_ADMIN"]}},
		{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_KILL_PROCESS","includes":{"minKernel":"99.0"}}]}`}
	contains(t, tg, s, "made", "changed", "no-setuid", "no-link", "synced")
	for _, o := range []string{"colour=blue", "seccomp=/etc/profile.json", "seccomp={}", `seccomp={"defaultAction":"SCMP_ACT_ALLOW","syscalls":[null]}`,
		`seccomp={"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/x","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}`,
		`seccomp={"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO","includes":{"minKernel":"0.0"}}]}`} {
		s.SecurityOpt = []string{o}
		s.Id = Unique("c")
		if err := tg.RT.Create(Context(t), s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", o, err)
		}
	}
}

func testTerminal(t *testing.T, tg Target) {
	// The size and the input come apart: it looks again at each line.
	s := sh(tg, `tty; echo $TERM; while read x; do set -- $(stty size); [ "$1" = 33 ] && break; done; stty size; exec cat`)
	s.Tty, s.StdinOpen = true, true
	id := create(t, tg, s)
	pr, pw := io.Pipe()
	defer pw.Close()
	var out safeBuffer
	resize := make(chan *v1.WindowSize)
	attached := make(chan bool, 1)
	done := make(chan error, 1)
	ctx := Context(t)
	go func() {
		done <- tg.RT.Attach(ctx, &v1.AttachSpec{ContainerId: id, Stdin: true}, runtime.Streams{Stdin: pr, Stdout: &out, Resize: resize, Started: func() { attached <- true }})
	}()
	<-attached
	if err := tg.RT.Start(ctx, id); err != nil {
		t.Fatal(err)
	}
	Eventually(t, "a terminal", func() bool {
		return strings.Contains(out.String(), "/dev/") && strings.Contains(out.String(), "xterm\r\n")
	})
	resize <- &v1.WindowSize{Rows: 33, Columns: 111}
	Eventually(t, "the new size", func() bool {
		if strings.Contains(out.String(), "33 111") {
			return true
		}
		_, _ = io.WriteString(pw, "\n")
		time.Sleep(50 * time.Millisecond)
		return strings.Contains(out.String(), "33 111")
	})
	_, _ = io.WriteString(pw, "\x04")
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(Limit):
		t.Error("cat goes on after end of input")
	}
	wait(t, tg, id)
}

func testExecUsers(t *testing.T, tg Target) {
	s := Spec(tg.Layer, "sleep", "1000")
	s.Env = []string{"A=container", "B=container"}
	id := start(t, tg, s)
	ex := func(e *v1.ExecSpec, st runtime.Streams) (int, string) {
		t.Helper()
		var out safeBuffer
		st.Stdout = &out
		e.ContainerId = id
		code, err := tg.RT.Exec(Context(t), e, st)
		if err != nil {
			t.Fatal(err)
		}
		return code, out.String()
	}
	if _, out := ex(&v1.ExecSpec{Args: []string{"sh", "-c", "id -un; pwd; echo $A $B $HOME"}, User: "app", WorkingDir: "/data", Env: []string{"A=exec"}}, runtime.Streams{}); out != "app\n/data\nexec container /home/app\n" {
		t.Errorf("exec as app: %q", out)
	}
	if _, out := ex(&v1.ExecSpec{Args: []string{"stty", "size"}, Tty: true, Stdin: true, Window: &v1.WindowSize{Rows: 20, Columns: 70}}, runtime.Streams{}); out != "20 70\r\n" {
		t.Errorf("window: %q", out)
	}
	signals := make(chan string, 1)
	code, _ := ex(&v1.ExecSpec{Args: []string{"sleep", "1000"}}, runtime.Streams{Signals: signals, Started: func() { signals <- "KILL" }})
	if code != 137 {
		t.Errorf("signalled exec: %d", code)
	}
	var errOut safeBuffer
	if _, out := ex(&v1.ExecSpec{Args: []string{"sh", "-c", "echo out; echo err >&2"}}, runtime.Streams{Stderr: &errOut}); out != "out\n" || errOut.String() != "err\n" {
		t.Errorf("streams: %q %q", out, errOut.String())
	}
	// Much output through a slow pipe, whole.
	if _, out := ex(&v1.ExecSpec{Args: []string{"sh", "-c", "yes 0123456789 | head -c 3000000"}}, runtime.Streams{}); len(out) != 3000000 {
		t.Errorf("%d bytes of 3000000", len(out))
	}
}

func testLogShapes(t *testing.T, tg Target) {
	s := sh(tg, `printf 'no newline'; echo err >&2; printf '\n'; head -c 40000 /dev/zero | tr '\0' x; printf '\n\377\376bytes\n'`)
	s.Log = &v1.LogConfig{MaxSizeBytes: 1 << 20, MaxFiles: 2}
	id := start(t, tg, s)
	wait(t, tg, id)
	var sizes []int
	var all []byte
	err := tg.RT.Logs(Context(t), &v1.LogOptions{ContainerId: id, Tail: -1, Stdout: true}, func(e *v1.LogEntry) error {
		sizes = append(sizes, len(e.Line))
		all = append(all, e.Line...)
		return nil
	})
	want := "no newline\n" + strings.Repeat("x", 40000) + "\n\xff\xfebytes\n"
	if err != nil || string(all) != want {
		t.Errorf("%v: %d bytes, want %d", err, len(all), len(want))
	}
	if slices.Max(sizes) > 16<<10 {
		t.Errorf("entries of %v bytes", sizes)
	}
	// Rotation while someone follows: not a line is missed.
	s = sh(tg, `read go; i=0; while [ $i -lt 20000 ]; do echo "line $i"; i=$((i+1)); done`)
	s.Log = &v1.LogConfig{MaxSizeBytes: 256 << 10, MaxFiles: 12}
	s.StdinOpen, s.StdinOnce = true, true
	id = start(t, tg, s)
	ctx := Context(t)
	next, last := 0, make(chan error, 1)
	go func() {
		last <- tg.RT.Logs(ctx, &v1.LogOptions{ContainerId: id, Tail: -1, Follow: true}, func(e *v1.LogEntry) error {
			if string(e.Line) != fmt.Sprintf("line %d\n", next) {
				return fmt.Errorf("got %q, want line %d", e.Line, next)
			}
			if next++; next == 20000 {
				return io.EOF
			}
			return nil
		})
	}()
	if err := tg.RT.Attach(ctx, &v1.AttachSpec{ContainerId: id, Stdin: true}, runtime.Streams{Stdin: strings.NewReader("\n")}); err != nil {
		t.Error(err)
	}
	wait(t, tg, id)
	if err := <-last; err == nil || err.Error() != "EOF" {
		t.Errorf("follower across rotations, at line %d: %v", next, err)
	}
	var tail []string
	if err := tg.RT.Logs(ctx, &v1.LogOptions{ContainerId: id, Tail: 3}, func(e *v1.LogEntry) error { tail = append(tail, string(e.Line)); return nil }); err != nil ||
		!slices.Equal(tail, []string{"line 19997\n", "line 19998\n", "line 19999\n"}) {
		t.Errorf("tail: %q %v", tail, err)
	}
}

func testPrivileged(t *testing.T, tg Target) {
	s := sh(tg, `mount -t tmpfs x /tmp && echo mounted; ls /dev/loop-control; grep Seccomp: /proc/self/status | tr '\t' ' '`)
	s.Privileged = true
	contains(t, tg, s, "mounted", "Seccomp: 0")
}
