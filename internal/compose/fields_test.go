package compose

import (
	"flag"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/schema"
	"github.com/compose-spec/compose-go/v2/types"
)

// Every attribute of the specification was decided on.
func TestEveryAttributeIsDecided(t *testing.T) {
	for _, p := range schema.AttributePaths() {
		d, under := decisions(), verdict(0)
		for part := range strings.SplitSeq(p.String(), ".") {
			next := d.next[part]
			if next == nil {
				next = d.next["*"]
			}
			if next == nil {
				if d.closed || under == 0 {
					t.Errorf("nobody decided on %s: add it to fields.go", p)
				}
				break
			}
			if d = next; d.field != nil {
				under = d.field.verdict
				if under != taken {
					break
				}
			}
		}
	}
}

// Nothing in the tables has left the specification, or was never in it.
func TestTablesNameWhatExists(t *testing.T) {
	var known []string
	for _, p := range schema.AttributePaths() {
		known = append(known, p.String())
	}
	for _, f := range fields {
		inStruct := strings.HasPrefix(f.path, "configs.*.driver") // in the struct, not in the schema
		if !slices.Contains(known, f.path) && f.path != "jobs" && !inStruct {
			t.Errorf("%s is not in the specification", f.path)
		}
		if f.verdict != taken && f.note == "" {
			t.Errorf("%s needs a note that says why", f.path)
		}
	}
}

// The Go structs hold nothing beyond the specification that could slip through.
func TestEveryStructFieldIsDecided(t *testing.T) {
	// Old fields that the schema refuses before we see them, and what is no attribute.
	old := []string{"name", "net", "log_driver", "log_opt", "dockerfile", "volume_driver", "-", "#extensions"}
	check := func(prefix string, typ reflect.Type) {
		for _, f := range reflect.VisibleFields(typ) {
			tag, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			if f.Anonymous || !f.IsExported() || tag == "" || slices.Contains(old, tag) {
				continue
			}
			if d := decisions().at(prefix + "." + tag); d.field == nil && !slices.Contains(inventory[prefix], tag) {
				t.Errorf("nobody decided on %s.%s (%s.%s): add it to fields.go", prefix, tag, typ.Name(), f.Name)
			}
		}
	}
	check("services.*", reflect.TypeFor[types.ServiceConfig]())
	check("services.*.deploy", reflect.TypeFor[types.DeployConfig]())
	check("services.*.networks.*", reflect.TypeFor[types.ServiceNetworkConfig]())
	check("services.*.volumes.[]", reflect.TypeFor[types.ServiceVolumeConfig]())
	check("services.*.healthcheck", reflect.TypeFor[types.HealthCheckConfig]())
	check("networks.*", reflect.TypeFor[types.NetworkConfig]())
	check("volumes.*", reflect.TypeFor[types.VolumeConfig]())
	check("configs.*", reflect.TypeFor[types.ConfigObjConfig]())
}

const page = "../../docs/architecture/compose.md"

// The page's table is the one in fields.go.
func TestPageHasTheTable(t *testing.T) {
	var b strings.Builder
	b.WriteString("| field | | |\n|---|---|---|\n")
	words := map[verdict]string{taken: "yes", harmless: "no effect", warned: "no effect, warning", refused: "refused"}
	for _, f := range fields {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", f.path, words[f.verdict], f.note)
	}
	raw, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	const begin, end = "<!-- fields: written by go test -update -->\n", "<!-- end -->\n"
	before, rest, ok := strings.Cut(string(raw), begin)
	have, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", page)
	}
	if have == b.String() {
		return
	}
	if u := flag.Lookup("update"); u == nil || u.Value.String() != "true" {
		t.Fatalf("%s is behind fields.go: go test ./internal/compose -update", page)
	}
	if err := os.WriteFile(page, []byte(before+begin+b.String()+end+after), 0o644); err != nil {
		t.Fatal(err)
	}
}
