package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// TestMain lets the test program be this command, too.
func TestMain(m *testing.M) {
	if os.Getenv("TANDEM_TEST_COMMAND") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func command(t *testing.T, lib string, args ...string) (string, error) {
	t.Helper()
	c := exec.Command("/proc/self/exe", args...)
	c.Env = []string{"TANDEM_TEST_COMMAND=1", "TANDEM_LIB_DIR=" + lib, "TANDEM_HOST=unix:///nowhere/tandem.sock"}
	c.Dir = t.TempDir()
	out, err := c.CombinedOutput()
	return string(out), err
}

func TestBecome(t *testing.T) {
	lib := t.TempDir()
	script := "#!/bin/sh\necho whole \"$@\"\nexit 7\n"
	if err := os.WriteFile(filepath.Join(lib, whole), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range []string{"serve --state-dir /x", "--help", "up -d", "doctor"} {
		out, err := command(t, lib, strings.Fields(args)...)
		if ee, ok := err.(*exec.ExitError); !ok || ee.ExitCode() != 7 || out != "whole "+args+"\n" {
			t.Errorf("tandem %s: %v %q", args, err, out)
		}
	}
	if out, err := command(t, lib, "version"); err != nil || strings.Contains(out, "whole") || !strings.Contains(out, "no server at") {
		t.Errorf("tandem version is not done by itself: %v %q", err, out)
	}
}

// A half installation is named, with what to do.
func TestHalfInstalled(t *testing.T) {
	err := becomeOneIn([]string{"", t.TempDir()})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "make install") || !strings.Contains(err.Error(), "TANDEM_LIB_DIR") {
		t.Error(err)
	}
}
