package simulate

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Hosts that fail while machines are on their way from or to them: nothing is lost
// from the books, whichever side it is.
func TestHostsFailUnderMigrations(t *testing.T) {
	failed := 0
	rapid.Check(t, func(t *rapid.T) {
		tr := anyTrace(t)
		tr.Until = max(tr.End(), 1000) + 600*1000
		o := Options{Hosts: []Pool{{Size: Size{8000, 16 * gib}}}, Overhead: Size{100, gib / 4}, Boot: 5 * time.Second, Grow: time.Second, BaselineBoot: time.Minute,
			HA: rapid.IntRange(0, 2).Draw(t, "ha"), Budget: 100, Baselines: []string{}, HAEvery: time.Minute, MigrateRate: gib / 32}
		run := func() string {
			t.Helper()
			var out bytes.Buffer
			o.Transcript = &out
			if _, err := Run(context.Background(), tr, o); err != nil {
				t.Fatalf("%v\n%s", err, tail(out.String()))
			}
			if _, err := Check(context.Background(), bytes.NewReader(out.Bytes()), "drawn"); err != nil {
				t.Fatalf("%v\n%s", err, tail(out.String()))
			}
			return out.String()
		}
		var flights []Line
		for _, l := range strings.Split(run(), "\n") {
			var v Line
			if strings.Contains(l, `"action":"migrate"`) && json.Unmarshal([]byte(l), &v) == nil {
				flights = append(flights, v)
			}
		}
		if len(flights) == 0 {
			return
		}
		failed++
		f := rapid.SampledFrom(flights).Draw(t, "flight")
		side := rapid.SampledFrom([]string{f.From, f.Host}).Draw(t, "side")
		o.Fail = []Failure{{Host: side, At: Time(f.T*1000) + 1000}}
		run()
	})
	if failed == 0 {
		t.Error("no machine migrated in any of the runs: nothing was tried")
	}
	t.Logf("%d hosts failed under a migration", failed)
}
