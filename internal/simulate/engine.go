package simulate

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"time"
)

// Kind is what an Event tells a policy.
type Kind uint8

// The kinds of events.
const (
	Arrived  Kind = iota + 1 // Container wants a place
	Left                     // Container is gone from Machine (nil: it had none)
	Booted                   // Machine is up
	Grown                    // Machine has the size asked for
	HostUp                   // Host is up
	HostLost                 // Host failed; Lost ran there and wants places again
	Moved                    // Machine has migrated; Host is where it was
	Tick                     // asked for with World.Wake
)

// Event is what a policy is told. Only the fields of its kind are set.
type Event struct {
	Kind      Kind
	Container *Container
	Machine   *Machine
	Host      *Host
	Lost      []*Container
}

// Policy decides. It sees each event when it has happened, and acts through the
// World; what it can't do now it keeps in mind itself and does at a later event.
// It must be deterministic. One value serves one run.
type Policy interface {
	// Name is the key of its figures in the report.
	Name() string
	// Handle answers an event and returns how many containers it was asked to
	// place and decided about, which is what decisions count.
	Handle(w *World, e Event) (decided int)
}

type eventKind uint8

// What happens at the same time happens in this order: first what frees or
// finishes, then failures, then what wants something.
const (
	evDepart eventKind = iota
	evHostUp
	evBooted
	evGrown
	evMigrated
	evFail
	evArrive
	evTick
)

type event struct {
	at        Time
	kind      eventKind
	seq       uint64
	container *Container
	machine   *Machine
	host      *Host
	size      Size
	name      string
}

// queue is a heap of events by time, kind and order of making.
type queue struct {
	list []event
	seq  uint64
}

func (q *queue) Len() int { return len(q.list) }
func (q *queue) Less(i, j int) bool {
	a, b := &q.list[i], &q.list[j]
	if a.at != b.at {
		return a.at < b.at
	}
	if a.kind != b.kind {
		return a.kind < b.kind
	}
	return a.seq < b.seq
}
func (q *queue) Swap(i, j int) { q.list[i], q.list[j] = q.list[j], q.list[i] }

// Push and Pop are heap.Interface's.
func (q *queue) Push(x any) { q.list = append(q.list, x.(event)) }

// Pop is heap.Interface's.
func (q *queue) Pop() any {
	last := len(q.list) - 1
	e := q.list[last]
	q.list[last] = event{}
	q.list = q.list[:last]
	return e
}

func (q *queue) push(e event) {
	q.seq++
	e.seq = q.seq
	heap.Push(q, e)
}

// afterEnd is how long containers that wait at the end may still wait: their
// waiting counts, but nothing else does any more.
const afterEnd = Time(3600 * 1000)

// replay runs one policy over the trace.
func replay(ctx context.Context, trace *Trace, o *Options, p Policy, log *transcript) (r Report, err error) {
	defer func() {
		switch b := recover().(type) {
		case nil:
		case broken:
			err = fmt.Errorf("policy %s broke a rule: %w", p.Name(), b.err)
		default:
			panic(b)
		}
	}()
	w := newWorld(o, trace, p, log)
	e := &engine{World: w, o: o, policy: p, trace: trace}
	return e.run(ctx)
}

type engine struct {
	*World
	o      *Options
	policy Policy
	trace  *Trace
	next   int // request
	steps  int
	other  time.Duration // of calls without a decision, not told yet
}

// peek is the time of the next event.
func (e *engine) peek() (Time, bool) {
	at, ok := Time(0), false
	if e.next < len(e.trace.Requests) && e.trace.Requests[e.next].Arrive <= e.meter.end {
		at, ok = e.trace.Requests[e.next].Arrive, true
	}
	if len(e.events.list) > 0 && (!ok || e.events.list[0].at < at) {
		at, ok = e.events.list[0].at, true
	}
	return at, ok
}

func (e *engine) run(ctx context.Context) (Report, error) {
	m := e.meter
	for _, f := range e.o.Fail {
		e.events.push(event{at: f.At, kind: evFail, name: f.Host})
	}
	for {
		at, ok := e.peek()
		if !ok || at > m.end && e.waiting == 0 || at > m.end+afterEnd {
			break
		}
		m.advance(e.World, at)
		e.now = at
		if err := e.step(); err != nil {
			return Report{}, err
		}
		if e.steps++; e.steps&1023 == 1 {
			if err := ctx.Err(); err != nil {
				return Report{}, err
			}
			if e.o.Progress != nil {
				e.o.Progress(e.policy.Name(), min(e.now, m.end), m.end, len(e.hosts), m.machines)
			}
		}
	}
	m.advance(e.World, m.end+1)
	r := m.report()
	e.log.line(Line{What: "end", At: max(e.now, m.end), Report: &r, Other: float64(e.other.Nanoseconds()) / 1000})
	return r, e.log.failed()
}

// step does the next event: of those at the same time, what frees comes first.
func (e *engine) step() error {
	if q := e.events.list; len(q) > 0 && q[0].at <= e.now && (q[0].kind < evArrive || e.next >= len(e.trace.Requests) || e.trace.Requests[e.next].Arrive > min(e.now, e.meter.end)) {
		return e.handle(heap.Pop(&e.events).(event))
	}
	q := &e.trace.Requests[e.next]
	e.next++
	c := &Container{Request: q}
	e.World.waiting++
	e.meter.arrive(q)
	e.log.line(arriveLine(q))
	e.ask(Event{Kind: Arrived, Container: c})
	return nil
}

func arriveLine(q *Request) Line {
	l := Line{What: "arrive", Container: q.ID, CPU: q.Need.CPU, Memory: q.Need.Memory, Project: q.Project, Service: q.Service, Class: q.Class}
	if !q.stays() {
		life := q.Life.Seconds()
		l.Life = &life
	}
	return l
}

func (e *engine) handle(v event) error {
	switch v.kind {
	case evDepart:
		if v.container.Done {
			return nil
		}
		e.ask(Event{Kind: Left, Container: v.container, Machine: e.depart(v.container)})
	case evHostUp:
		if v.host.Gone {
			return nil
		}
		v.host.Up = true
		e.log.line(Line{What: "host-up", Host: v.host.ID})
		for _, m := range v.host.Machines {
			if !m.booting {
				e.startBoot(m)
			}
		}
		e.ask(Event{Kind: HostUp, Host: v.host})
	case evBooted:
		m := v.machine
		if m.Gone {
			return nil
		}
		m.Up, m.booting, m.Live = true, false, m.Size
		e.log.line(Line{What: "booted", Machine: m.ID, Host: m.Host.ID})
		e.startWaiting(m)
		e.ask(Event{Kind: Booted, Machine: m})
	case evGrown:
		m := v.machine
		if m.Gone || !m.Up {
			return nil
		}
		to := Size{min(v.size.CPU, m.Size.CPU), min(v.size.Memory, m.Size.Memory)}
		m.Live = m.Live.max(to)
		e.log.line(Line{What: "grown", Machine: m.ID, Host: m.Host.ID, CPU: m.Live.CPU, Memory: m.Live.Memory})
		e.startWaiting(m)
		e.ask(Event{Kind: Grown, Machine: m})
	case evMigrated:
		if v.machine.Gone || v.machine.target == nil {
			return nil
		}
		from := v.machine.Host
		e.migrated(v.machine)
		e.ask(Event{Kind: Moved, Machine: v.machine, Host: from})
	case evFail:
		for _, h := range e.hosts {
			if h.ID == v.name {
				_, lost := e.fail(h)
				e.ask(Event{Kind: HostLost, Host: h, Lost: lost})
				return nil
			}
		}
		return fmt.Errorf("--fail %s@%gs: that host is not switched on at that time (%d are)", v.name, v.at.Seconds(), len(e.hosts))
	case evTick:
		if v.at == e.wake {
			e.wake = -1
			e.ask(Event{Kind: Tick})
		}
	default:
		return errors.New("an event of unknown kind")
	}
	return nil
}

// ask calls the policy and takes the time it needs.
func (e *engine) ask(v Event) {
	var before time.Duration
	if e.o.Stopwatch != nil {
		before = e.o.Stopwatch()
	}
	n := e.policy.Handle(e.World, v)
	var took time.Duration
	if e.o.Stopwatch != nil {
		took = e.o.Stopwatch() - before
	}
	if !e.meter.decided(n, took) {
		return
	}
	us := float64(took.Nanoseconds()) / 1000
	if n == 0 {
		e.other += took // told with the next line
		return
	}
	e.log.line(Line{What: "decided", Containers: n, Micros: us, Other: float64(e.other.Nanoseconds()) / 1000})
	e.other = 0
}
