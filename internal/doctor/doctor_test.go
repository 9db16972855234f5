package doctor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor/kvmprobe"
)

func TestMain(m *testing.M) {
	kvmprobe.MaybeChild()
	os.Exit(m.Run())
}

// host makes a host from files and a few answers.
func host(t *testing.T, files map[string]string) Options {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Options{
		StateDir: filepath.Join(root, "not/there/yet"), Root: root,
		LookPath: func(s string) (string, error) { return "/usr/bin/" + s, nil },
		KVM: func(context.Context) kvmprobe.Verdict {
			return kvmprobe.Verdict{Usable: true, Present: true, Reason: "yes"}
		},
		Run: func(context.Context, ...string) (string, error) { return "QEMU emulator version 7.2.22 (Debian)", nil },
	}
}

var good = map[string]string{
	"/proc/self/mounts":                 "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
	"/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids\n",
	"/proc/sys/net/ipv4/ip_forward":     "1\n", "/proc/filesystems": "nodev\toverlay\n",
	"/proc/meminfo": "MemTotal: 8000000 kB\nMemFree: 1 kB\nMemAvailable: 7000000 kB\n",
	"/dev/net/tun":  "", "/dev/loop-control": "",
}

func byCode(found []*v1.Finding) map[string]*v1.Finding {
	m := map[string]*v1.Finding{}
	for _, f := range found {
		m[f.GetCode()] = f
	}
	return m
}

func TestFindings(t *testing.T) {
	with := func(name, content string) map[string]string {
		m := map[string]string{}
		for k, v := range good {
			m[k] = v
		}
		if content == "" {
			delete(m, name)
		} else {
			m[name] = content
		}
		return m
	}
	module := with("/proc/filesystems", "ext4") // not loaded yet
	module["/proc/sys/kernel/osrelease"] = "6.1.0-9-amd64\n"
	module["/lib/modules/6.1.0-9-amd64/modules.dep"] = "kernel/fs/overlayfs/overlay.ko:\n"
	none := func(string) (string, error) { return "", errors.New("not found") }
	verdict := func(v kvmprobe.Verdict) func(*Options) {
		return func(o *Options) { o.KVM = func(context.Context) kvmprobe.Verdict { return v } }
	}
	for _, c := range []struct {
		code, severity string
		files          map[string]string
		change         func(*Options)
	}{
		{"kvm", OK, good, nil},
		{"kvm-missing", Warning, good, verdict(kvmprobe.Verdict{Reason: "no"})},
		{"kvm-unusable", Warning, good, verdict(kvmprobe.Verdict{Present: true, Reason: "crawls"})},
		{"kvm-denied", Warning, good, verdict(kvmprobe.Verdict{Present: true, Reason: "/dev/kvm can't be opened: x"})},
		{"qemu-missing", Error, good, func(o *Options) { o.LookPath = none }},
		{"mkfs-missing", Error, good, func(o *Options) { o.LookPath = none }},
		{"nft-missing", Info, good, func(o *Options) { o.LookPath = none }},
		{"qemu-old", Error, good, func(o *Options) {
			o.Run = func(context.Context, ...string) (string, error) { return "QEMU emulator version 6.2.0", nil }
		}},
		{"nftables-missing", Error, good, func(o *Options) {
			o.Run = func(context.Context, ...string) (string, error) { return "x", errors.New("exit 1") }
		}},
		{"cgroup", OK, good, nil},
		{"cgroup-controllers", Warning, with("/sys/fs/cgroup/cgroup.controllers", "memory"), nil},
		{"cgroup", OK, with("/proc/self/mounts", "c /c cgroup rw,memory 0 0\nc /c cgroup rw,cpu 0 0\nc /c cgroup rw,pids 0 0\n"), nil},
		{"tun-missing", Error, with("/dev/net/tun", ""), nil},
		{"ip-forward-off", Info, with("/proc/sys/net/ipv4/ip_forward", "0"), nil},
		{"overlayfs-missing", Warning, with("/proc/filesystems", "ext4"), nil},
		{"overlayfs", OK, module, nil},
		{"loop-missing", Warning, with("/dev/loop-control", ""), nil},
		{"memory-low", Warning, with("/proc/meminfo", "MemTotal: 900000 kB\nMemAvailable: 1000 kB\n"), nil},
	} {
		o := host(t, c.files)
		if c.change != nil {
			c.change(&o)
		}
		f := byCode(Check(context.Background(), o))[c.code]
		if f == nil || f.GetSeverity() != c.severity || f.GetTitle() == "" || c.severity != OK && (f.GetRemedy() == "" || f.GetDetail() == "") {
			t.Errorf("%s: %v", c.code, f)
		}
	}
}

func TestThisHost(t *testing.T) {
	found := Check(context.Background(), Options{StateDir: t.TempDir()})
	if len(found) < 10 {
		t.Errorf("only %d findings", len(found))
	}
	for _, f := range found {
		t.Logf("%-8s %-20s %s: %s [%s]", f.GetSeverity(), f.GetCode(), f.GetTitle(), f.GetDetail(), f.GetRemedy())
	}
	t.Log("worst:", Worst(found))
}
