package simulate

import (
	"bytes"
	"context"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the transcripts in testdata")

// The transcripts are to be read: the same ten containers with one VM each, in
// Kubernetes, and with Tandem. testdata/ten.csv is the trace.
func TestTranscripts(t *testing.T) {
	for _, name := range []string{"tandem", "vm-per-container", "best-fit"} {
		f, err := os.Open("testdata/ten.csv")
		if err != nil {
			t.Fatal(err)
		}
		trace, err := Read(f, ReadOptions{Name: "ten.csv"})
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		o := Options{Hosts: []Pool{{Size: Size{8000, 16 << 30}}}, Overhead: Size{100, 256 << 20}, Boot: 5 * time.Second, Grow: time.Second,
			BaselineBoot: time.Minute, HA: 1, Budget: -1, Policy: name, Baselines: []string{}, Transcript: &out}
		if _, err := Run(context.Background(), trace, o); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join("testdata", name+".ndjson")
		if *update {
			if err := os.WriteFile(file, out.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), want) {
			t.Errorf("%s is not as in %s any more; look at it, and run go test -update ./internal/simulate\n%s", name, file, firstDifference(out.String(), string(want)))
		}
		if _, err := Check(context.Background(), bytes.NewReader(want), file); err != nil {
			t.Error(err)
		}
	}
}

func firstDifference(got, want string) string {
	a, b := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range a {
		if i >= len(b) || a[i] != b[i] {
			return "got  " + a[i] + "\nwant " + strings.Join(b[min(i, len(b)-1):min(i+1, len(b))], "")
		}
	}
	return "it is shorter"
}
