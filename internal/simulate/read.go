package simulate

import (
	"bufio"
	"compress/gzip"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"tandem/internal/planner"

	"github.com/containerd/errdefs"
)

const defaultMemory = planner.DefaultMemory

// Formats of traces.
const (
	FormatAuto   = "auto"      // by the header
	FormatTandem = "tandem"    // id,arrive_s,life_s,cpu_milli,mem_mib[,project,service,class]
	FormatAzure  = "azure2017" // id,arrive_s,batch,vcpu,mem_gib,life_s[,censored]
	FormatOpenB  = "openb"     // name,cpu_milli,memory_mib,...,qos,...
)

// Bounds on what is read, so that a bomb is an error and not a dead computer.
const (
	maxLine    = 64 << 10
	maxName    = 200
	defaultMax = 5_000_000 // requests
	maxBytes   = 8 << 30   // after decompression
)

// ReadOptions are how to read a trace.
type ReadOptions struct {
	Name   string // for messages
	Format string // one of the formats; empty: FormatAuto
	// MaxRequests bounds the trace's length; 0: 5 million.
	MaxRequests int
}

// column numbers of a header; -1: not there.
type columns map[string]int

// format reads the rows of one kind of trace.
type format struct {
	needs   []string
	ordered bool // out of order is an error; else the requests are sorted
	cut     bool // the observation ended with the last arrival
	row     func(get func(string) string) (Request, error)
}

var formats = map[string]format{
	FormatTandem: {needs: []string{"id", "arrive_s", "life_s", "cpu_milli", "mem_mib"}, ordered: true, row: tandemRow},
	FormatAzure:  {needs: []string{"id", "arrive_s", "batch", "vcpu", "mem_gib", "life_s"}, cut: true, row: azureRow},
	FormatOpenB:  {needs: []string{"name", "cpu_milli", "memory_mib"}, ordered: true, row: openbRow},
}

// Read reads a trace, gzip or plain. Whatever is wrong is an
// errdefs.ErrInvalidArgument that names the line.
func Read(r io.Reader, o ReadOptions) (*Trace, error) {
	if o.Format == "" {
		o.Format = FormatAuto
	}
	if o.MaxRequests <= 0 {
		o.MaxRequests = defaultMax
	}
	if _, ok := formats[o.Format]; !ok && o.Format != FormatAuto {
		return nil, fmt.Errorf("trace format %q is not one of auto, tandem, azure2017, openb: %w", o.Format, errdefs.ErrInvalidArgument)
	}
	lines, err := newLines(r, o.Name)
	if err != nil {
		return nil, err
	}
	header, err := lines.next()
	if errors.Is(err, io.EOF) {
		return nil, lines.bad("the file is empty: a header line is needed, such as %s", strings.Join(formats[FormatTandem].needs, ","))
	} else if err != nil {
		return nil, err
	}
	cols, err := headerColumns(header)
	if err != nil {
		return nil, lines.bad("%v", err)
	}
	f, err := chooseFormat(o.Format, cols)
	if err != nil {
		return nil, lines.bad("%v", err)
	}
	t := &Trace{Name: o.Name}
	seen := map[string]int{}
	for {
		fields, err := lines.next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		if len(t.Requests) == o.MaxRequests {
			return nil, lines.bad("more than %d requests: cut the trace", o.MaxRequests)
		}
		if len(fields) != len(header) {
			return nil, lines.bad("%d fields, but the header has %d", len(fields), len(header))
		}
		q, err := f.row(func(name string) string {
			if i, ok := cols[name]; ok {
				return strings.TrimSpace(fields[i])
			}
			return ""
		})
		if err != nil {
			return nil, lines.bad("%v", err)
		}
		if before, ok := seen[q.ID]; ok {
			return nil, lines.bad("id %q is already that of line %d", clip(q.ID), before)
		}
		seen[q.ID] = lines.n
		if n := len(t.Requests); f.ordered && n > 0 && q.Arrive < t.Requests[n-1].Arrive {
			return nil, lines.bad("%q arrives at %g s, before the line above (%g s): sort the trace by arrive_s", clip(q.ID), q.Arrive.Seconds(), t.Requests[n-1].Arrive.Seconds())
		}
		t.Requests = append(t.Requests, q)
	}
	if len(t.Requests) == 0 {
		return nil, lines.bad("the trace has a header but no requests")
	}
	slices.SortStableFunc(t.Requests, func(a, b Request) int { return int(max(-1, min(1, a.Arrive-b.Arrive))) })
	if f.cut {
		t.Until = t.Requests[len(t.Requests)-1].Arrive
	}
	return t, nil
}

func headerColumns(header []string) (columns, error) {
	cols := columns{}
	for i, name := range header {
		name = strings.ToLower(strings.TrimSpace(name))
		if name == "" {
			continue
		}
		if _, ok := cols[name]; ok {
			return nil, fmt.Errorf("the header names %q twice", clip(name))
		}
		cols[name] = i
	}
	return cols, nil
}

func chooseFormat(name string, cols columns) (format, error) {
	order := []string{name}
	if name == FormatAuto {
		order = []string{FormatTandem, FormatAzure, FormatOpenB}
	}
	var missing []string
	for i, name := range order {
		f := formats[name]
		var lack []string
		for _, n := range f.needs {
			if _, ok := cols[n]; !ok {
				lack = append(lack, n)
			}
		}
		if len(lack) == 0 {
			return f, nil
		}
		if i == 0 {
			missing = lack
		}
	}
	return format{}, fmt.Errorf("the header lacks %s of %s", strings.Join(missing, ", "), strings.Join(formats[order[0]].needs, ","))
}

// line is one of the trace's own format.
func tandemRow(get func(string) string) (Request, error) {
	q, err := commonRow(get, "id", "arrive_s", "life_s")
	if err != nil {
		return q, err
	}
	cpu, err := number(get("cpu_milli"), maxCPU)
	if err != nil {
		return q, fmt.Errorf("cpu_milli %w", err)
	}
	mem, err := number(get("mem_mib"), maxMemory>>20)
	if err != nil {
		return q, fmt.Errorf("mem_mib %w", err)
	}
	q.Need = sizeOf(cpu, mem)
	if q.Project, err = name("project", get("project")); err != nil {
		return q, err
	}
	if q.Service, err = name("service", get("service")); err != nil {
		return q, err
	}
	q.Class, err = className(get("class"))
	return q, err
}

// commonRow reads what all formats have; arrive and life may be "".
func commonRow(get func(string) string, id, arrive, life string) (Request, error) {
	q := Request{Life: -1, Class: ClassLatency}
	var err error
	if q.ID, err = name("id", get(id)); err != nil {
		return q, err
	}
	if q.ID == "" {
		return q, errors.New("the id is empty")
	}
	if arrive != "" {
		s, err := number(get(arrive), maxTime.Seconds())
		if err != nil {
			return q, fmt.Errorf("%s %w", arrive, err)
		}
		q.Arrive = seconds(s)
	}
	if text := get(life); life != "" && text != "" {
		s, err := number(text, maxTime.Seconds())
		if err != nil {
			return q, fmt.Errorf("%s %w", life, err)
		}
		q.Life = seconds(s)
	}
	return q, nil
}

// name checks an identifier: it is printed and written to transcripts.
func name(what, s string) (string, error) {
	if len(s) > maxName {
		return "", fmt.Errorf("%s of %d bytes: %d is the most", what, len(s), maxName)
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return "", fmt.Errorf("%s %s has characters that can't be printed", what, strconv.Quote(clip(s)))
	}
	return strings.Clone(s), nil
}

// lines yields the fields of CSV lines, none longer than maxLine.
type lines struct {
	r    *bufio.Reader
	name string
	n    int
	left int64
}

func newLines(r io.Reader, name string) (*lines, error) {
	l := &lines{name: name, left: maxBytes}
	b := bufio.NewReaderSize(r, maxLine)
	if magic, _ := b.Peek(2); len(magic) == 2 && magic[0] == 0x1f && magic[1] == 0x8b {
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, l.bad("gzip: %v", err)
		}
		b = bufio.NewReaderSize(z, maxLine)
	}
	if mark, _ := b.Peek(3); string(mark) == "\xef\xbb\xbf" {
		if _, err := b.Discard(3); err != nil {
			return nil, l.bad("%v", err)
		}
	}
	l.r = b
	return l, nil
}

func (l *lines) bad(form string, a ...any) error {
	where := l.name
	if where == "" {
		where = "trace"
	}
	if l.n > 0 {
		where += fmt.Sprintf(": line %d", l.n)
	}
	return fmt.Errorf("%s: %s: %w", where, fmt.Sprintf(form, a...), errdefs.ErrInvalidArgument)
}

// next returns the fields of the next line that is not empty, or io.EOF.
func (l *lines) next() ([]string, error) {
	for {
		raw, err := l.r.ReadSlice('\n')
		l.n++
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			return nil, l.bad("longer than %d bytes", maxLine)
		case errors.Is(err, io.EOF):
			if len(raw) == 0 {
				return nil, io.EOF
			}
		case err != nil:
			return nil, l.bad("can't be read: %v", err)
		}
		if l.left -= int64(len(raw)); l.left < 0 {
			return nil, l.bad("the file is larger than %d GiB", int64(maxBytes)>>30)
		}
		text := strings.TrimRight(string(raw), "\r\n")
		if strings.TrimSpace(text) == "" {
			continue
		}
		if !strings.Contains(text, `"`) {
			return strings.Split(text, ","), nil
		}
		c := csv.NewReader(strings.NewReader(text))
		fields, err := c.Read()
		if err != nil {
			var p *csv.ParseError
			if errors.As(err, &p) {
				err = p.Err
			}
			return nil, l.bad("%v", err)
		}
		return fields, nil
	}
}
