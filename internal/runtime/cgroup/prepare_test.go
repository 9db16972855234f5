package cgroup

import (
	"os"
	"path/filepath"
	"testing"
)

// The process stays where it is, and the kernel takes the order.
func TestPrepare(t *testing.T) {
	l, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := l.prepare(); err != nil {
			t.Error(err)
		}
	}
	l.Prepare()
	l.Prepare()
	if after, err := os.ReadFile("/proc/self/cgroup"); err != nil || string(after) != string(before) {
		t.Errorf("it was in\n%sand is in\n%s%v", before, after, err)
	}
}

func TestOwn(t *testing.T) {
	root := t.TempDir()
	for _, d := range []string{"v2/a/b", "pids/a", "cpu/x"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	in := func(d string) string { return filepath.Join(root, d) }
	v1 := map[string]string{"pids": in("pids"), "cpu": in("cpu")}
	for _, c := range []struct {
		l            *Layout
		groups, want string
	}{
		{&Layout{v2: in("v2")}, "0::/a/b\n", in("v2/a/b")},
		{&Layout{v2: in("v2")}, "0::/elsewhere\n", ""}, // not below what is mounted here
		{&Layout{v1: v1}, "9:name=systemd:/y\n8:pids:/a\n1:cpu,cpuacct:/x\n", in("pids/a")},
		{&Layout{v1: v1}, "1:cpu,cpuacct:/x\n0::/\n", in("cpu/x")},
		{&Layout{v2: in("v2"), v1: v1}, "8:pids:/gone\n0::/\n", in("v2")},
		{&Layout{v1: v1}, "rubbish\n\n0::/\n", ""},
		{&Layout{v2: in("v2")}, "0::/../../etc\n", ""},
	} {
		if got := c.l.own(c.groups); got != c.want {
			t.Errorf("%q: %q, want %q", c.groups, got, c.want)
		}
	}
}
