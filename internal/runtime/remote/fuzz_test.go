package remote

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
)

// FuzzAnswers decodes arbitrary bytes as each message that a guest may send and
// checks it: no panic, and what passes is within bounds.
func FuzzAnswers(f *testing.F) {
	add := func(m proto.Message) {
		b, _ := proto.Marshal(m)
		f.Add(b)
	}
	st := &v1.RuntimeStatus{Id: "c", State: v1.ContainerState_CONTAINER_STATE_EXITED, ExitCode: 3}
	add(&v1.RuntimeListResponse{Containers: []*v1.RuntimeStatus{st}})
	add(&v1.RuntimeEvent{Id: "c", Action: "exit", Status: st})
	add(&v1.RuntimeEvent{Action: "exit", Status: st})
	add(&v1.RuntimeStatsResponse{Usage: &v1.Usage{MemoryBytes: 1}})
	add(&v1.RuntimeTopResponse{Processes: []*v1.Process{{Pid: 1, Command: "x"}}})
	add(&v1.LogEntry{Stream: "stdout", Line: []byte("x"), ContainerId: "c"})
	f.Fuzz(func(t *testing.T, b []byte) {
		var list v1.RuntimeListResponse
		if proto.Unmarshal(b, &list) == nil && checkList(list.Containers) == nil {
			for _, s := range list.Containers {
				if len(s.Id) > 64 || s.ExitCode < 0 || s.ExitCode > 255 || s.Pid < 0 {
					t.Errorf("passed: %v", s)
				}
			}
		}
		var ev v1.RuntimeEvent
		if proto.Unmarshal(b, &ev) == nil && checkEvent(&ev) == nil && ev.Status.GetId() != ev.Id {
			t.Errorf("passed: %v", &ev)
		}
		var stats v1.RuntimeStatsResponse
		if proto.Unmarshal(b, &stats) == nil && checkUsage(stats.Usage) == nil && stats.Usage.MemoryBytes < 0 {
			t.Errorf("passed: %v", &stats)
		}
		var top v1.RuntimeTopResponse
		if proto.Unmarshal(b, &top) == nil && checkTop(top.Processes) == nil && len(top.Processes) > maxProcesses {
			t.Error("passed: too many processes")
		}
		var e v1.LogEntry
		if proto.Unmarshal(b, &e) == nil && checkEntry(&e, "c") == nil && len(e.Line) > maxLine {
			t.Error("passed: a long line")
		}
	})
}

// FuzzStream feeds arbitrary HTTP bodies to the client's calls, as a guest that
// speaks rubbish would: each call ends with an error or a checked value.
func FuzzStream(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0}, "0")
	f.Add([]byte{0, 0, 0, 0, 2, 0x20, 1}, "0")
	f.Add([]byte{0, 255, 255, 255, 255}, "")
	f.Fuzz(func(t *testing.T, body []byte, status string) {
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Trailer", "Grpc-Status")
			_, _ = w.Write(body)
			w.Header().Set("Grpc-Status", status)
		})
		c := NewClient(&http.Client{Transport: direct{h}}, "http://guest")
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if l, err := c.List(ctx); err == nil && checkList(l) != nil {
			t.Errorf("passed: %v", l)
		}
		_ = c.Logs(ctx, &v1.LogOptions{ContainerId: "c"}, func(*v1.LogEntry) error { return nil })
		if ch, err := c.Events(ctx); err == nil {
			for range ch { //nolint:revive // until it ends
			}
		}
		if code, err := c.Exec(ctx, &v1.ExecSpec{ContainerId: "c"}, runtime.Streams{}); err == nil && (code < 0 || code > 255) {
			t.Errorf("exit code %d", code)
		}
	})
}

// direct answers requests without a network, as HTTP/2.
type direct struct{ h http.Handler }

func (d direct) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		defer r.Body.Close() // as a guest that resets the stream
	}
	w := httptest.NewRecorder()
	d.h.ServeHTTP(w, r)
	res := w.Result()
	res.Proto, res.ProtoMajor, res.ProtoMinor, res.Request = "HTTP/2.0", 2, 0, r
	return res, nil
}
