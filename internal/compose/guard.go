package compose

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/containerd/errdefs"

	"tandem/api/resource"
)

// checkFile refuses what is no file of a reasonable size: a device or pipe would
// be read for ever. A file that is missing or a directory is left to the reader's
// own message.
func checkFile(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil || info.IsDir():
		return nil
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file: %w", path, errdefs.ErrInvalidArgument)
	case info.Size() > MaxFile:
		return fmt.Errorf("%s has %d bytes, more than %s: %w", path, info.Size(), resource.FormatMemory(MaxFile), errdefs.ErrInvalidArgument)
	}
	return nil
}

// guard sees the files that include and extends name, before they are read. It is
// registered as a loader of remote files that never accepts any.
type guard struct {
	dirs []string // where relative paths may start
}

// unfit carries checkFile's error out of the reader, which has no way back from here.
type unfit struct{ error }

// Accept always says no.
func (g *guard) Accept(path string) bool {
	candidates := []string{path}
	if !filepath.IsAbs(path) {
		candidates = nil
		for _, d := range g.dirs {
			candidates = append(candidates, filepath.Join(d, path))
		}
	}
	for _, c := range candidates {
		if err := checkFile(c); err != nil {
			panic(unfit{err})
		}
		if d := filepath.Dir(c); !slices.Contains(g.dirs, d) && len(g.dirs) < 100 {
			g.dirs = append(g.dirs, d)
		}
	}
	return false
}

// Load is never called.
func (g *guard) Load(context.Context, string) (string, error) {
	return "", fmt.Errorf("remote Compose files are not supported: %w", errdefs.ErrInvalidArgument)
}

// Dir is never called.
func (g *guard) Dir(path string) string { return path }

// resolveFiles reads the services' env_file and label_file, once they are checked.
func resolveFiles(p *types.Project) (*types.Project, error) {
	for _, name := range sortedKeys(p.Services) {
		s := p.Services[name]
		files := slices.Clone(s.LabelFiles)
		for _, f := range s.EnvFiles {
			files = append(files, f.Path)
		}
		for _, f := range files {
			if err := checkFile(f); err != nil {
				return nil, fmt.Errorf("service %s: %w", name, err)
			}
		}
	}
	p, err := p.WithServicesEnvironmentResolved(true)
	if err != nil {
		return nil, err
	}
	return p.WithServicesLabelsResolved(true)
}
