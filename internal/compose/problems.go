package compose

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Problem is one thing that stands in the way: where in the model, and what to do.
type Problem struct {
	Path string // "services.web.pid"
	Text string
}

// Error holds all problems of a project; errors.Is sees errdefs.ErrInvalidArgument.
type Error struct {
	Project  string
	Problems []Problem
}

func (e *Error) Error() string {
	lines := make([]string, 0, len(e.Problems)+1)
	head := "1 problem"
	if len(e.Problems) != 1 {
		head = fmt.Sprintf("%d problems", len(e.Problems))
	}
	lines = append(lines, fmt.Sprintf("project %s: %s in the Compose files:", e.Project, head))
	for _, p := range e.Problems {
		lines = append(lines, "  "+p.Path+": "+p.Text)
	}
	return strings.Join(lines, "\n")
}

// Unwrap gives the error's class.
func (e *Error) Unwrap() error { return errdefs.ErrInvalidArgument }

// report collects problems and warnings.
type report struct {
	problems []Problem
	warnings []string
}

func (r *report) problem(path, format string, args ...any) {
	r.problems = append(r.problems, Problem{path, fmt.Sprintf(format, args...)})
}

func (r *report) warn(path, format string, args ...any) {
	r.warnings = append(r.warnings, path+": "+fmt.Sprintf(format, args...))
}

func (r *report) err(project string) error {
	if len(r.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(r.problems, func(a, b Problem) int {
		if c := strings.Compare(a.Path, b.Path); c != 0 {
			return c
		}
		return strings.Compare(a.Text, b.Text)
	})
	return &Error{Project: project, Problems: slices.Compact(r.problems)}
}

func (r *report) warned() []string {
	slices.Sort(r.warnings)
	return slices.Compact(r.warnings)
}

// at is a place in the model from which problems are reported.
type at struct {
	*report
	path string
}

func (a at) in(name string) at               { return at{a.report, a.path + "." + name} }
func (a at) bad(format string, args ...any)  { a.problem(a.path, format, args...) }
func (a at) note(format string, args ...any) { a.warn(a.path, format, args...) }
