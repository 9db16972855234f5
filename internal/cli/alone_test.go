package cli

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/distribution/reference"
)

// The small program carries out what it knows, and leaves the rest to the whole one.
func TestAlone(t *testing.T) {
	for args, alone := range map[string]bool{
		"":                                false,
		"--help":                          false,
		"help ps":                         false,
		"completion bash":                 false,
		"__complete ps":                   false,
		"serve":                           false,
		"guest build":                     false,
		"machine":                         false,
		"state restore x":                 false,
		"nonsense":                        false,
		"ps -a":                           true,
		"--format json ps":                true,
		"-f compose.yaml logs web":        true,
		"run --rm busybox serve --help":   true,
		"machine ls":                      true,
		"state ls":                        true,
		"-H unix:///x/tandem.sock run -d": true,
	} {
		if got := Alone(Env{}, strings.Fields(args)); got != alone {
			t.Errorf("tandem %s: alone is %v", args, got)
		}
	}
}

// A command that is named first is made without the others, and is the same.
func TestOneCommand(t *testing.T) {
	whole := New(Env{})
	listed := map[string]bool{"help": true, "completion": true}
	for _, e := range entries {
		listed[e.name] = true
		c, _, err := whole.Find([]string{e.name})
		if err != nil || c.Name() != e.name || c.HasSubCommands() != e.parts || c.GroupID != e.group {
			t.Errorf("%s is %q with parts %v in group %s: %v", e.name, c.Name(), c.HasSubCommands(), c.GroupID, err)
		}
		one, _, err := commands(Env{}, e.name).Find([]string{e.name})
		if err != nil || one.Name() != e.name || one.UsageString() != c.UsageString() {
			t.Errorf("%s by itself differs: %v\n%s", e.name, err, one.UsageString())
		}
	}
	for _, c := range whole.Commands() {
		if !listed[c.Name()] {
			t.Errorf("%s is not in the list", c.Name())
		}
	}
}

// familiar says of full references what the images' store would.
func TestFamiliar(t *testing.T) {
	for _, s := range []string{"docker.io/library/busybox:latest", "docker.io/library/busybox@sha256:8e740f29dc3769b307438a55e87cfc6d30d36cc7bf23e8b7f583f771f68a949e",
		"docker.io/some/app:1", "docker.io/library/deep/app:1", "localhost:5000/app:1", "quay.io/library/app:1", "registry.example/a/b/c:2"} {
		n, err := reference.ParseNormalizedNamed(s)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := familiar(s), reference.FamiliarString(n); got != want {
			t.Errorf("%s is %s, not %s", s, got, want)
		}
	}
}

// What needs a Compose file or this computer's own check becomes the whole program,
// before anything is printed.
func TestBecomesWhole(t *testing.T) {
	whole := errors.New("whole")
	run := func(args ...string) (bool, string) {
		var out strings.Builder
		became := false
		env := Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &out,
			Getenv: func(k string) string {
				return map[string]string{"TANDEM_HOST": "unix:///nowhere/tandem.sock"}[k]
			},
			Whole: func() error {
				if became = true; out.Len() > 0 {
					t.Errorf("tandem %v printed %q first", args, out.String())
				}
				return whole
			}}
		if code := Run(context.Background(), env, args); code != ExitFailed {
			t.Errorf("tandem %v: exit code %d: %s", args, code, out.String())
		}
		return became, out.String()
	}
	t.Chdir(t.TempDir())
	for _, args := range [][]string{{"up"}, {"doctor"}, {"-f", "x.yaml", "down"}} {
		if became, out := run(args...); !became || !strings.Contains(out, "whole") {
			t.Errorf("tandem %v: %s", args, out)
		}
	}
	if became, out := run("ps"); became || !strings.Contains(out, "no server at") {
		t.Errorf("tandem ps without a Compose file: %s", out)
	}
	if err := os.WriteFile("compose.yaml", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir("below", 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir("below")
	if became, _ := run("down"); !became {
		t.Error("tandem down below a Compose file does not read it")
	}
}
