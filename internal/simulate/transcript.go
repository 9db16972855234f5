package simulate

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
)

// Line is a line of a transcript: an event, an action, or (first and last) what
// the run was and what it came to. Times are seconds since the trace's zero, sizes
// are millicores and bytes and always the whole size afterwards, not a difference.
//
//	run              what is replayed; Run is set
//	arrive           Container with its needs asks for a place
//	decided          the policy decided about Containers, in Micros; since the line before it took Other
//	place            Container is given Machine
//	start            it runs there from now on; its life counts from its first start
//	depart           its life is over
//	refuse           it will never run: Why
//	move, moved      Container starts in Machine, and has left machine From; in between it counts in both
//	move-failed      the host where it was going failed: it stays in Machine
//	evict            it gave way to others, and wants a place again
//	lost             it ran, or was to run, on a host that failed
//	host-on          Host is switched on; counts from now
//	host-up          it can run machines
//	host-off         it is switched off
//	host-fail        it failed, and never comes back
//	boot, booted     Machine is reserved on Host and starts; is up
//	grow, grown      Machine is to have a larger size; has it
//	shrink           it has a smaller one
//	stop             it is gone from Host
//	migrate,         Machine goes from host From to Host, counts on both; counts
//	migrated         on Host only
//	migration-failed it stays on From
//	end              the figures; Report is set
type Line struct {
	At         Time     `json:"-"`
	T          float64  `json:"time"`
	What       string   `json:"action"`
	Container  string   `json:"container,omitempty"`
	Machine    string   `json:"machine,omitempty"`
	Host       string   `json:"host,omitempty"`
	From       string   `json:"from,omitempty"`
	CPU        int64    `json:"cpu_milli,omitempty"`
	Memory     int64    `json:"mem_bytes,omitempty"`
	Life       *float64 `json:"life_s,omitempty"`
	Project    string   `json:"project,omitempty"`
	Service    string   `json:"service,omitempty"`
	Class      string   `json:"class,omitempty"`
	Own        bool     `json:"own,omitempty"`
	Why        string   `json:"why,omitempty"`
	Containers int      `json:"containers,omitempty"`
	Micros     float64  `json:"us,omitempty"`
	Other      float64  `json:"other_us,omitempty"`
	Run        *RunLine `json:"run,omitempty"`
	Report     *Report  `json:"report,omitempty"`
}

// RunLine is the first line of a transcript: all that the figures depend on.
type RunLine struct {
	Trace         string     `json:"trace"`
	Policy        string     `json:"policy"`
	Isolation     string     `json:"isolation"`
	Resizable     bool       `json:"resizable"`
	OverheadCPU   int64      `json:"overhead_cpu_milli"`
	OverheadBytes int64      `json:"overhead_mem_bytes"`
	BootS         float64    `json:"boot_s"`
	GrowS         float64    `json:"grow_s"`
	HostBootS     float64    `json:"host_boot_s"`
	WarmupS       float64    `json:"warmup_s"`
	EndS          float64    `json:"end_s"`
	HAEveryS      float64    `json:"ha_every_s"`
	Hosts         []HostLine `json:"hosts"`
}

// HostLine is a pool of hosts.
type HostLine struct {
	ID     string `json:"id,omitempty"`
	CPU    int64  `json:"cpu_milli"`
	Memory int64  `json:"mem_bytes"`
	Count  int    `json:"count"` // 0: as many as are needed
}

// transcript writes lines; nil writes nothing.
type transcript struct {
	buf *bufio.Writer
	enc *json.Encoder
	now func() Time
	err error
}

func newTranscript(w io.Writer) *transcript {
	if w == nil {
		return nil
	}
	b := bufio.NewWriterSize(w, 1<<20)
	e := json.NewEncoder(b)
	e.SetEscapeHTML(false)
	return &transcript{buf: b, enc: e}
}

func (t *transcript) line(l Line) {
	if t == nil || t.err != nil {
		return
	}
	if l.At == 0 {
		l.At = t.now()
	}
	l.T = l.At.Seconds()
	t.err = t.enc.Encode(&l)
	if t.err == nil && l.What == "end" {
		t.err = t.buf.Flush()
	}
}

// failed is why the transcript could not be written.
func (t *transcript) failed() error {
	if t == nil || t.err == nil {
		return nil
	}
	return fmt.Errorf("transcript: %w", t.err)
}
