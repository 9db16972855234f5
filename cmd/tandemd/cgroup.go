package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"tandem/internal/runtime/cgroup"

	"github.com/containerd/errdefs"
)

// envCgroup names the control group that somebody (build/tandem-workloads.service)
// has handed over to Tandem for what it runs.
const envCgroup = "TANDEM_CGROUP"

// groupFile keeps which group that is: it must stay the same until the next boot,
// whoever starts Tandem and however.
func (d *dirs) groupFile() string { return filepath.Join(d.run, "cgroup") }

// workloads is the path of the control group, below the mount points, that holds
// all that this Tandem runs: its machines, containers, monitor and name server. The
// first who asks after a boot decides: what the environment names, if it is there
// and has the controllers of cgroup v2, and else a group at the top. It never is the
// group of the asking process: under systemd its unit may be stopped or killed at
// any time with all that is in it.
func (d *dirs) workloads() (string, error) {
	b, err := os.ReadFile(d.groupFile())
	if err == nil {
		group, err := checkGroup(strings.TrimSpace(string(b)), d.groupFile())
		if err != nil {
			return "", err
		}
		return group, settle(filepath.Dir(group))
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("control group of workloads: %w", err)
	}
	group := "/" + d.instance()
	if given := os.Getenv(envCgroup); given != "" {
		if given, err = checkGroup(given, envCgroup); err != nil {
			return "", err
		}
		l, err := cgroup.Detect()
		if err != nil {
			return "", err
		}
		old, err := l.Group(group).Procs()
		if err != nil {
			return "", err
		}
		switch {
		case len(old) > 0:
			// A version that knew no other place has started these; they stay there.
		case !l.Unified():
			// The unit has no group with controllers where they are those of v1.
		case !l.Group(given).Exists():
			return "", fmt.Errorf("%s=%s: there is no such control group: systemctl start tandem-workloads.service makes it: %w", envCgroup, given, errdefs.ErrFailedPrecondition)
		default:
			group = filepath.Join(given, d.instance())
			if err := settle(given); err != nil {
				return "", err
			}
		}
	}
	tmp := d.groupFile() + ".tmp"
	if err := os.WriteFile(tmp, []byte(group+"\n"), 0o644); err != nil {
		return "", fmt.Errorf("control group of workloads: %w", err)
	}
	if err := os.Rename(tmp, d.groupFile()); err != nil {
		return "", fmt.Errorf("control group of workloads: %w", err)
	}
	return group, nil
}

// settle makes room in a group that was handed over: one that has processes of its own
// can't hand controllers down, so that who holds it for us gets a group inside.
func settle(given string) error {
	if given == "/" {
		return nil
	}
	l, err := cgroup.Detect()
	if err != nil {
		return err
	}
	return l.Group(given).MoveInto("keeper")
}

func checkGroup(path, where string) (string, error) {
	if len(path) < 2 || path != filepath.Clean(path) || path[0] != '/' || strings.ContainsAny(path, "\n\x00") {
		return "", fmt.Errorf("%s names no control group: %q is no absolute, clean path below /sys/fs/cgroup: %w", where, path, errdefs.ErrInvalidArgument)
	}
	return path, nil
}

// groupFor returns the function that opens a group of its own for a process beside
// the workloads; see spawn.Session.
func groupFor(workloads, name string) func() (*os.File, error) {
	return func() (*os.File, error) {
		l, err := cgroup.Detect()
		if err != nil {
			return nil, nil // no control groups at all: it runs without
		}
		return l.Open(filepath.Join(workloads, name))
	}
}
