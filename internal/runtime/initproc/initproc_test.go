package initproc

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

func initCmd(args ...string) *exec.Cmd {
	c := exec.Command("/proc/self/exe")
	c.Args = append([]string{"/sbin/" + Name, "--"}, args...)
	return c
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
	}{{[]string{"true"}, 0}, {[]string{"sh", "-c", "exit 9"}, 9}, {[]string{"sh", "-c", "kill -9 $$"}, 137}, {[]string{"no-such-program"}, 127}, {nil, 2}} {
		cmd := initCmd(c.args...)
		_ = cmd.Run()
		if got := cmd.ProcessState.ExitCode(); got != c.code {
			t.Errorf("%v: %d, want %d", c.args, got, c.code)
		}
	}
}

func TestSignalsAndOrphans(t *testing.T) {
	// As process 1 of a namespace of its own: orphans come to it.
	cmd := initCmd("sh", "-c", `(sleep 0.1 & echo $! ) ; trap 'ls -d /proc/[0-9]* | wc -l; exit 4' TERM; echo up; while :; do sleep 0.1; done`)
	var out bytes.Buffer
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = w
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	buf := make([]byte, 256)
	for !strings.Contains(out.String(), "up") {
		n, err := r.Read(buf)
		if err != nil {
			t.Fatal(err, out.String())
		}
		out.Write(buf[:n])
	}
	time.Sleep(300 * time.Millisecond)
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != 4 {
		t.Errorf("exit code %d", got)
	}
}
