package layout

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

type pkg struct {
	ImportPath string
	Name       string
	Doc        string
	Imports    []string
	GoFiles    []string
	Standard   bool
}

// packages lists this module's packages.
func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Doc,Imports,GoFiles", "./...")
	cmd.Dir = "../.."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var list []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		p.ImportPath = strings.TrimPrefix(p.ImportPath, "tandem/")
		list = append(list, p)
	}
	if len(list) < 10 {
		t.Fatalf("only %d packages found", len(list))
	}
	return list
}

// floors is the house from the roof down: a package may import packages of lower
// floors, and of its own room, never of a higher one. The longest prefix counts.
var floors = []struct {
	prefix string
	floor  int
}{
	{"cmd", 100},
	{"test", 100},
	{"bench", 100},
	{"internal/layout", 100},
	{"internal/cli", 90},
	{"internal/server", 80},
	{"internal/control", 70},
	{"internal/agent", 60},
	{"internal/guest", 60},
	{"internal/guest/layout", 15},
	{"internal/guestimage", 40},
	{"internal/doctor", 50},
	{"internal/hypervisor", 40},
	{"internal/runtime", 40},
	{"internal/image", 40},
	{"internal/network", 40},
	{"internal/volume", 40},
	{"internal/compose", 40},
	{"internal/store", 40},
	{"internal/simulate", 40},
	{"internal/planner", 30},
	{"internal/session", 20},
	{"internal/rpc", 20},
	{"internal/files", 15},
	{"internal/clock", 15},
	{"internal/spawn", 15},
	{"api", 10},
}

func floor(path string) (int, string) {
	best, at := -1, ""
	for _, f := range floors {
		if (path == f.prefix || strings.HasPrefix(path, f.prefix+"/")) && len(f.prefix) > len(at) {
			best, at = f.floor, f.prefix
		}
	}
	return best, at
}

func TestImportsRunDownwards(t *testing.T) {
	for _, p := range packages(t) {
		if p.ImportPath == "tandem" {
			continue
		}
		mine, room := floor(p.ImportPath)
		if mine < 0 {
			t.Errorf("%s stands on no floor: add it to floors", p.ImportPath)
			continue
		}
		for _, i := range p.Imports {
			i, ours := strings.CutPrefix(i, "tandem/")
			if !ours {
				continue
			}
			theirs, other := floor(i)
			if room == other {
				continue
			}
			if theirs >= mine {
				t.Errorf("%s (floor %d) imports %s (floor %d): imports run only downwards", p.ImportPath, mine, i, theirs)
			}
		}
	}
}

// The faces know the API and nothing below it; what needs no server is reached
// directly: Compose files, and the simulator's world of its own.
func TestFacesKnowOnlyTheAPI(t *testing.T) {
	allowed := []string{"api", "internal/rpc", "internal/compose", "internal/simulate"}
	for _, p := range packages(t) {
		if p.ImportPath != "internal/cli" {
			continue
		}
		for _, i := range p.Imports {
			i, ours := strings.CutPrefix(i, "tandem/")
			if !ours {
				continue
			}
			ok := false
			for _, a := range allowed {
				ok = ok || i == a || strings.HasPrefix(i, a+"/")
			}
			if !ok {
				t.Errorf("%s imports %s: a face speaks the API only", p.ImportPath, i)
			}
		}
	}
}

func TestPlannerIsPure(t *testing.T) {
	forbidden := []string{"os", "io", "net", "time", "context", "math/rand", "math/rand/v2", "crypto/rand", "log", "log/slog", "sync", "syscall", "bufio"}
	for _, p := range packages(t) {
		if p.ImportPath != "internal/planner" {
			continue
		}
		for _, i := range p.Imports {
			for _, f := range forbidden {
				if i == f || strings.HasPrefix(i, f+"/") {
					t.Errorf("the planner imports %s: it has no I/O, no clock, no chance and no goroutine", i)
				}
			}
		}
	}
}

func TestEveryPackageIsDocumented(t *testing.T) {
	for _, p := range packages(t) {
		if len(p.GoFiles) == 0 || strings.HasPrefix(p.ImportPath, "api/tandem") {
			continue
		}
		if len(p.Doc) < 40 {
			t.Errorf("%s has no doc comment that teaches its use", p.ImportPath)
		}
	}
}

func TestFilesAreReadInASitting(t *testing.T) {
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == ".cache" || d.Name() == "bin") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.Contains(path, "api/tandem") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if n := bytes.Count(b, []byte("\n")); n > 500 {
			t.Errorf("%s has %d lines: make it two rooms", path, n)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
