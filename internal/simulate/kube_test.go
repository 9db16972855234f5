package simulate

import (
	"strings"
	"testing"
	"time"
)

// Three pods need two nodes of half a host; when the second is alone on its node
// and fits beside the first, the autoscaler waits ten minutes and drains it.
func TestTheAutoscalerBootsAndDrains(t *testing.T) {
	o := smallHosts()
	trace := traceOf(request("a", 1, -1, 700, 1), request("b", 1, 1000, 900, 1), request("c", 2, -1, 800, 1), request("end", 4000, 1, 100, 0.1))
	k := newKube("half-host", false, Size{4000, 8 * gib}, Size{2000, 4 * gib})
	r, out, err := play(t, trace, o, k)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		`{"time":10,"action":"boot","machine":"m-1"`, // at the first scan
		`{"time":10,"action":"boot","machine":"m-2"`,
		`{"time":70,"action":"start","container":"a"`,
		`{"time":1070,"action":"depart","container":"b"}`,
		`{"time":1670,"action":"move","container":"`, // unneeded for ten minutes
		`{"time":1670,"action":"stop"`,
	} {
		if !strings.Contains(out, line) {
			t.Errorf("no %s in\n%s", line, out)
		}
	}
	if r.ContainerMoves != 1 || r.PeakMachines != 2 || r.WaitP99 != 69 {
		t.Errorf("got %+v\n%s", r, out)
	}
}

// An empty node goes after ten minutes; a pod that no shape holds gets a large node.
func TestTheAutoscalerRemovesEmptyNodes(t *testing.T) {
	o := smallHosts()
	o.BaselineBoot = 30 * time.Second
	trace := traceOf(request("a", 0, 60, 700, 1), request("large", 0, 60, 3900, 1), request("end", 4000, 1, 100, 0.1))
	r, out, err := play(t, trace, o, newKube("half-host", false, Size{4000, 8 * gib}, Size{2000, 4 * gib}))
	if err != nil {
		t.Fatal(err)
	}
	// Ready at 40 s, both empty from 100 s, seen so at that scan: gone at 700 s.
	for _, line := range []string{`"action":"boot","machine":"m-2","host":"h-0002","cpu_milli":4000`, `{"time":700,"action":"host-off","host":"h-0001"}`, `{"time":700,"action":"host-off","host":"h-0002"}`} {
		if !strings.Contains(out, line) {
			t.Errorf("no %s in\n%s", line, out)
		}
	}
	if r.PeakHosts != 2 || r.Rejected != 0 {
		t.Errorf("got %+v", r)
	}
}

// Spreading puts replicas on different nodes, best fit does not.
func TestSpreading(t *testing.T) {
	for _, spread := range []bool{true, false} {
		trace := traceOf(request("big-1", 0, -1, 1500, 1), request("big-2", 0, -1, 1500, 1), request("a", 100, -1, 100, 0.1), request("b", 101, -1, 100, 0.1))
		for i := range trace.Requests {
			trace.Requests[i].Service = trace.Requests[i].ID[:1]
		}
		trace.Requests[3].Service = "a"
		_, out, err := play(t, trace, smallHosts(), newKube("k", spread, Size{4000, 8 * gib}, Size{2000, 4 * gib}))
		if err != nil {
			t.Fatal(err)
		}
		apart := strings.Contains(out, `"place","container":"a","machine":"m-1"`) != strings.Contains(out, `"place","container":"b","machine":"m-1"`)
		if apart != spread {
			t.Errorf("spread %v: apart is %v\n%s", spread, apart, out)
		}
	}
}
