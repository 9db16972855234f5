package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

// Defaults of the directories.
const (
	defaultStateDir = "/var/lib/tandem"
	defaultRunDir   = "/run/tandem"
)

// dirs are where one Tandem on this computer keeps its things. Several can live
// side by side, each with directories, control groups and sockets of its own.
type dirs struct {
	state, run, lib string
	verbose         bool
}

func (d *dirs) flags(c *cobra.Command, lib bool) {
	f := c.Flags()
	f.StringVar(&d.state, "state-dir", defaultStateDir, "what must survive a reboot")
	f.StringVar(&d.run, "run-dir", defaultRunDir, "sockets, and what need not survive one")
	if lib {
		f.StringVar(&d.lib, "lib-dir", os.Getenv("TANDEM_LIB_DIR"), "directory with runc and guest/ (default: beside this command, or /usr/local/lib/tandem)")
	}
	f.BoolVar(&d.verbose, "verbose", false, "log every step")
}

// check makes the directories absolute and existing.
func (d *dirs) check() error {
	for _, p := range []*string{&d.state, &d.run} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
		if err := os.MkdirAll(abs, 0o711); err != nil {
			return fmt.Errorf("directory %s: %w", abs, err)
		}
	}
	if n := len(d.run); n > 60 {
		return fmt.Errorf("--run-dir %s: paths of unix sockets are short; choose one of at most 60 bytes: %w", d.run, errdefs.ErrInvalidArgument)
	}
	return nil
}

// findLib looks for runc and the guest image.
func (d *dirs) findLib() error {
	var tried []string
	candidates := []string{d.lib}
	if d.lib == "" {
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		candidates = []string{filepath.Dir(exe), filepath.Join(filepath.Dir(exe), "../lib/tandem"), "/usr/local/lib/tandem", "/usr/lib/tandem"}
	}
	for _, c := range candidates {
		c = filepath.Clean(c)
		if _, err := os.Stat(filepath.Join(c, "guest", "current")); err == nil {
			d.lib, err = filepath.Abs(c)
			return err
		}
		tried = append(tried, c)
	}
	return fmt.Errorf("no guest image in %v: make it with `make guest`, or name its directory with --lib-dir: %w", tried, errdefs.ErrNotFound)
}

// instance names this Tandem among others on the same computer: "tandem" with
// the default directories, "tandem-1a2b3c4d" else.
func (d *dirs) instance() string {
	if d.run == defaultRunDir {
		return "tandem"
	}
	sum := sha256.Sum256([]byte(d.run))
	return "tandem-" + hex.EncodeToString(sum[:4])
}

func (d *dirs) logger() *slog.Logger {
	level := slog.LevelInfo
	if d.verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}
