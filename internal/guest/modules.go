package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"tandem/internal/guest/layout"
)

// loadList loads the modules that a list names, in its order. A module that does
// not load is told and left out: what needs it fails with its own words.
func loadList(list string, log *slog.Logger) {
	b, err := os.ReadFile(list)
	if err != nil {
		log.Error("list of modules", "error", err)
		return
	}
	for _, name := range strings.Fields(string(b)) {
		if err := insert(name); err != nil {
			log.Error("module", "name", name, "error", err)
		}
	}
}

// insert loads one module; one that is loaded already is no error.
func insert(name string) error {
	f, err := os.Open(filepath.Join(layout.ModuleDir, filepath.Base(name)+".ko"))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", name, err)
	}
	return nil
}

// Modprobe is what the kernel calls when it misses a module: args are those of
// modprobe ("-q -- name"). Only modules of the image can be loaded, whoever made
// the kernel ask. It returns the exit code.
func Modprobe(args []string) int {
	code := 0
	for i, a := range args {
		if strings.HasPrefix(a, "-") {
			continue
		}
		if err := load(a); err != nil {
			code = 1
		}
		if i > 8 {
			break
		}
	}
	return code
}

// load loads a module by name or alias, after those that it depends on.
func load(want string) error {
	b, err := os.ReadFile(layout.ModuleIndex)
	if err != nil {
		return err
	}
	want = strings.ReplaceAll(want, "-", "_")
	depends := map[string][]string{}
	found := ""
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		switch {
		case len(f) == 0:
		case f[0] == "alias" && len(f) == 3:
			if found == "" && aliasMatches(f[1], want) {
				found = f[2]
			}
		default:
			depends[f[0]] = f[1:]
			if f[0] == want {
				found = want
			}
		}
	}
	if found == "" {
		return unix.ENOENT
	}
	return loadWith(found, depends, 0)
}

func loadWith(name string, depends map[string][]string, depth int) error {
	if depth > 16 {
		return unix.ELOOP
	}
	for _, d := range depends[name] {
		if _, ours := depends[d]; !ours {
			continue // built in
		}
		if err := loadWith(d, depends, depth+1); err != nil {
			return err
		}
	}
	return insert(name)
}

// aliasMatches compares as modprobe does: patterns, '-' like '_'.
func aliasMatches(pattern, want string) bool {
	ok, err := path.Match(strings.ReplaceAll(pattern, "-", "_"), want)
	return err == nil && ok
}
