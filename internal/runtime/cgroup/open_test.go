package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// In the v2 tree, which is also there beside controllers of v1, a process is born in
// a group, and moved out of a group's way.
func TestOpenAndMoveInto(t *testing.T) {
	l, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("/tandem-test-open-%d", os.Getpid())
	if !l.Unified() {
		if f, err := l.Open(name); f != nil || err != nil || l.Group(name).Exists() {
			t.Errorf("controllers are those of v1: %v, %v", f, err)
		}
	}
	if l.v2 == "" {
		t.Log("no v2 tree is mounted")
		return
	}
	l = &Layout{v2: l.v2, roots: []string{l.v2}}
	g := l.Group(name)
	defer func() {
		if err := errors.Join(g.Kill(t.Context()), g.Remove(t.Context())); err != nil {
			t.Error(err)
		}
	}()
	if g.Exists() {
		t.Fatal("it is there already")
	}
	f, err := l.Open(name)
	if err != nil || !g.Exists() {
		t.Fatal(err)
	}
	defer f.Close()
	if err := g.MoveInto("none"); err != nil || l.Group(name+"/none").Exists() {
		t.Errorf("nothing to move: %v", err)
	}
	c := exec.Command("sleep", "1000")
	c.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	}()
	if !g.Has(c.Process.Pid) {
		t.Error("it was not born in the group")
	}
	if err := g.MoveInto("keeper"); err != nil {
		t.Fatal(err)
	}
	if !l.Group(name + "/keeper").Has(c.Process.Pid) {
		t.Error("it was not moved")
	}
	if err := g.MoveInto("keeper"); err != nil {
		t.Error("again:", err)
	}
	if err := l.Group(name + "/gone").MoveInto("x"); err != nil {
		t.Error("a group that does not exist:", err)
	}
	if err := l.Group("/").MoveInto("x"); err != nil || l.Group("/x").Exists() {
		t.Error("the root:", err)
	}
}
