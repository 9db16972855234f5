package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"
)

const whole = "tandemd"

// become makes this process tandemd with the same arguments. It comes back only
// with an error.
func become() error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	dir := filepath.Dir(exe)
	return becomeOneIn([]string{os.Getenv("TANDEM_LIB_DIR"), dir, filepath.Join(dir, "../lib/tandem"), "/usr/local/lib/tandem", "/usr/lib/tandem"})
}

func becomeOneIn(places []string) error {
	for _, d := range places {
		if d == "" {
			continue
		}
		path := filepath.Join(d, whole)
		err := syscall.Exec(path, append([]string{path}, os.Args[1:]...), os.Environ())
		if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("start %s: %w", path, err)
		}
	}
	return fmt.Errorf("%s, the other half of this command, is neither beside it nor in /usr/local/lib/tandem: put it there with `make install`, or name its directory in TANDEM_LIB_DIR: %w", whole, errdefs.ErrNotFound)
}
