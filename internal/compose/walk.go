package compose

import (
	"slices"
	"strings"
	"sync"
)

// decided is the tree of decisions that fields and inventory make up.
type decided struct {
	field  *field
	closed bool // only the listed keys are known
	next   map[string]*decided
}

var decisions = sync.OnceValue(func() *decided {
	root := &decided{}
	for i := range fields {
		root.at(fields[i].path).field = &fields[i]
	}
	for _, p := range parents {
		root.at(p).closed = true
	}
	for p, keys := range inventory {
		d := root.at(p)
		d.closed = true
		for _, k := range keys {
			d.at(k)
		}
	}
	return root
})

func (d *decided) at(path string) *decided {
	if path == "" {
		return d
	}
	for part := range strings.SplitSeq(path, ".") {
		if d.next == nil {
			d.next = map[string]*decided{}
		}
		if d.next[part] == nil {
			d.next[part] = &decided{}
		}
		d = d.next[part]
	}
	return d
}

// walker compares a model with the decisions.
type walker struct {
	*report
	ignoreBuild bool
}

// tandemPlaces is where x-tandem means something.
var tandemPlaces = []string{"", "services.*", "volumes.*"}

// walk reports what is not taken in value, which lies at path (for people) and
// pattern (in the specification).
func (w *walker) walk(d *decided, path, pattern string, value any) {
	if d.field != nil {
		switch d.field.verdict {
		case refused:
			if pattern == "services.*.build" && w.ignoreBuild {
				w.warn(path, "ignored as asked for: the image must exist")
				return
			}
			if !empty(value) {
				w.problem(path, "%s", d.field.note)
			}
			return
		case warned:
			w.warn(path, "has no effect: %s", d.field.note)
			return
		case harmless:
			return
		}
	}
	switch v := value.(type) {
	case map[string]any:
		for _, k := range sortedKeys(v) {
			below := join(path, k)
			if strings.HasPrefix(k, "x-") && d.next["*"] == nil {
				if k == "x-tandem" && !slices.Contains(tandemPlaces, pattern) {
					w.problem(below, "x-tandem has no meaning here; it belongs to the project, a service or a volume")
				}
				continue
			}
			next, step := d.next[k], k
			if next == nil {
				next, step = d.next["*"], "*"
			}
			if next == nil {
				if d.closed {
					w.problem(below, "this field is not supported")
				}
				continue
			}
			w.walk(next, below, join(pattern, step), v[k])
		}
	case []any:
		if next := d.next["[]"]; next != nil {
			for _, e := range v {
				w.walk(next, path, join(pattern, "[]"), e)
			}
		}
	}
}

// empty says whether a value is one that changes nothing wherever it stands.
func empty(v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case string:
		return v == ""
	case bool:
		return !v
	case []any:
		return len(v) == 0
	case map[string]any:
		return false
	}
	return false
}

func join(path, k string) string {
	if path == "" {
		return k
	}
	return path + "." + k
}
