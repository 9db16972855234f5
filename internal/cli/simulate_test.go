package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const smallTrace = "id,arrive_s,life_s,cpu_milli,mem_mib,project\na,0,3600,1000,1024,p\nb,10,,2000,2048,p\nc,20,100,500,512,q\n"

func simulateCommand(t *testing.T, args ...string) (string, string, int) {
	t.Helper()
	var out, errs bytes.Buffer
	code := Run(context.Background(), Env{Stdin: strings.NewReader(smallTrace), Stdout: &out, Stderr: &errs, Getenv: func(string) string { return "" }}, append([]string{"simulate"}, args...))
	return out.String(), errs.String(), code
}

func TestSimulateReportsTheKeysOfTheContract(t *testing.T) {
	out, errs, code := simulateCommand(t, "--trace", "-", "--hosts", "4c,8g*auto", "--format", "json")
	if code != ExitDone {
		t.Fatalf("exit %d: %s", code, errs)
	}
	keys := []string{"host_hours", "machine_hours", "lower_bound_host_hours", "lower_bound_machine_hours", "host_hours_ratio", "peak_hosts", "peak_machines", "container_moves", "machine_moves",
		"machine_move_gib", "wait_mean_s", "wait_p50_s", "wait_p99_s", "rejected", "ha_covered_share", "decisions", "decisions_per_s", "decision_p99_us"}
	slices.Sort(keys)
	var r map[string]any
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	base, _ := r["baselines"].(map[string]any)
	delete(r, "baselines")
	if got := slices.Sorted(maps.Keys(r)); !slices.Equal(got, keys) {
		t.Errorf("keys are %v", got)
	}
	if got := slices.Sorted(maps.Keys(base)); !slices.Equal(got, []string{"best-fit", "half-host", "kubernetes", "vm-per-container", "whole-host"}) {
		t.Errorf("baselines are %v", got)
	}
	for n, b := range base {
		if got := slices.Sorted(maps.Keys(b.(map[string]any))); !slices.Equal(got, keys) {
			t.Errorf("keys of %s are %v", n, got)
		}
	}
	if !strings.Contains(errs, "whole-host") {
		t.Errorf("no progress: %q", errs)
	}
}

func TestSimulateTranscriptAndCheck(t *testing.T) {
	for _, name := range []string{"t.ndjson", "t.ndjson.gz"} {
		file := filepath.Join(t.TempDir(), name)
		if out, errs, code := simulateCommand(t, "--trace", "-", "--hosts", "4c,8g*3", "--baselines", "none", "--transcript", file); code != ExitDone || !strings.Contains(out, "tandem") {
			t.Fatalf("exit %d: %s%s", code, out, errs)
		}
		if out, errs, code := simulateCommand(t, "check", file); code != ExitDone || !strings.Contains(out, "tandem") {
			t.Errorf("exit %d: %s%s", code, out, errs)
		}
	}
	file := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(file, []byte("{}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := simulateCommand(t, "check", file); code != ExitFailed || !strings.Contains(errs, "line 1") {
		t.Errorf("exit %d: %s", code, errs)
	}
}

func TestSimulateSaysWhatIsWrong(t *testing.T) {
	for _, x := range []struct {
		args string
		code int
		want string
	}{
		{"", ExitUsage, "--trace FILE is needed"},
		{"--trace - --hosts 4c", ExitUsage, "--hosts: hosts \"4c\""},
		{"--trace - --overhead much", ExitUsage, "--overhead"},
		{"--trace - --fail h-0001", ExitUsage, "--fail \"h-0001\""},
		{"--trace - --migrate-rate 0", ExitUsage, "--migrate-rate"},
		{"--trace - --projects -1", ExitUsage, "--projects"},
		{"--trace - --format-in openb", ExitFailed, "line 1: the header lacks name"},
		{"--trace - --baselines nomad", ExitFailed, "no policy \"nomad\""},
		{"--trace - --warmup 2h", ExitFailed, "within the warm-up"},
		{"--trace /nowhere/t.csv", ExitFailed, "/nowhere/t.csv"},
		{"--trace - --hosts 0.1c,1g*auto", ExitFailed, "no room for a machine's overhead"},
	} {
		if _, errs, code := simulateCommand(t, strings.Fields(x.args)...); code != x.code || !strings.Contains(errs, x.want) {
			t.Errorf("%s: exit %d, %q", x.args, code, errs)
		}
	}
}
