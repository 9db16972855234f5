package cli

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
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
