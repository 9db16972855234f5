package cli

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	v1 "tandem/api/tandem/v1"

	"golang.org/x/term"
)

// progress shows long work on standard error: a block that is redrawn on a
// terminal, a line for each step elsewhere.
type progress struct {
	w       io.Writer
	tty     bool
	width   int
	started time.Time
	now     func() time.Time
	order   []string
	last    map[string]*v1.Progress
	since   map[string]time.Time
	drawn   int
	printed map[string]time.Time
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w, now: time.Now, last: map[string]*v1.Progress{}, since: map[string]time.Time{}, printed: map[string]time.Time{}}
	p.started = p.now()
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.tty = true
		p.width, _, _ = term.GetSize(int(f.Fd()))
	}
	return p
}

// step takes one message of a progress stream.
func (p *progress) step(m *v1.Progress) {
	if m == nil || m.GetId() == "" && m.GetMessage() == "" {
		return
	}
	before, known := p.last[m.GetId()]
	if !known {
		p.order = append(p.order, m.GetId())
	}
	if !known || before.GetAction() != m.GetAction() {
		p.since[m.GetId()] = p.now()
	}
	changed := !known || before.GetAction() != m.GetAction() || before.GetDone() != m.GetDone() || before.GetFailed() != m.GetFailed() ||
		(m.GetUnit() == "" && before.GetMessage() != m.GetMessage())
	p.last[m.GetId()] = m
	if p.tty {
		p.draw()
		return
	}
	// Bytes move often: say so every two seconds only.
	if changed || p.now().Sub(p.printed[m.GetId()]) >= 2*time.Second && (before.GetCurrent() != m.GetCurrent()) {
		p.printed[m.GetId()] = p.now()
		fmt.Fprintf(p.w, "%7.1fs  %s\n", p.now().Sub(p.started).Seconds(), p.line(m))
	}
}

func (p *progress) line(m *v1.Progress) string {
	mark := "·"
	if m.GetFailed() {
		mark = "✗"
	} else if m.GetDone() {
		mark = "✓"
	}
	s := fmt.Sprintf("%s %-22s %s", mark, m.GetId(), m.GetAction())
	if m.GetUnit() == "bytes" && m.GetTotal() > 0 {
		s += fmt.Sprintf(" %s of %s", bytesText(m.GetCurrent()), bytesText(m.GetTotal()))
	} else if m.GetUnit() == "bytes" && m.GetCurrent() > 0 {
		s += " " + bytesText(m.GetCurrent())
	} else if m.GetTotal() > 0 {
		s += fmt.Sprintf(" %d/%d", m.GetCurrent(), m.GetTotal())
	}
	if t := m.GetMessage(); t != "" {
		s += "  " + t
	}
	return printable(s)
}

// draw redraws the block: the last lines that fit, newest things below.
func (p *progress) draw() {
	var b strings.Builder
	if p.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", p.drawn)
	}
	ids := p.order
	if len(ids) > 20 {
		ids = ids[len(ids)-20:]
	}
	for _, id := range ids {
		m := p.last[id]
		s := fmt.Sprintf("%7.1fs  %s", p.since[id].Sub(p.started).Seconds(), p.line(m))
		if r := []rune(s); p.width > 8 && len(r) > p.width-1 {
			s = string(r[:p.width-2]) + "…"
		}
		b.WriteString("\x1b[2K" + s + "\n")
	}
	p.drawn = len(ids)
	io.WriteString(p.w, b.String())
}
