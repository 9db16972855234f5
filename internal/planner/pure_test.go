package planner_test

import (
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The planner computes, and nothing else: no I/O, no clock, no chance, no goroutines.
func TestImportsAreFewAndPure(t *testing.T) {
	allowed := []string{"cmp", "errors", "fmt", "maps", "math", "math/bits", "slices", "sort", "strconv", "strings"}
	files, err := os.ReadDir(".")
	must(t, err)
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".go") || strings.HasSuffix(f.Name(), "_test.go") {
			continue
		}
		tree, err := parser.ParseFile(token.NewFileSet(), f.Name(), nil, parser.ImportsOnly)
		must(t, err)
		for _, i := range tree.Imports {
			if path, _ := strconv.Unquote(i.Path.Value); !slices.Contains(allowed, path) {
				t.Errorf("%s imports %s; allowed are %v", f.Name(), path, allowed)
			}
		}
	}
}
