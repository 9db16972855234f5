package control

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/clock"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// Clock tells the time; tests bring their own.
type Clock = clock.Clock

// Options of New. Zero values take the defaults that are named.
type Options struct {
	Store  *store.Store // required
	Logger *slog.Logger
	Clock  Clock
	Rand   io.Reader // ids and MAC addresses; default crypto/rand

	// ClusterCIDR is what networks are cut from (default 10.64.0.0/10), each
	// NetworkBits long (default 22).
	ClusterCIDR netip.Prefix
	NetworkBits int
	// Elasticity is how machines follow their containers.
	Elasticity
	// HostGrace is how long a host may be away before it counts as lost (default 3 s).
	HostGrace time.Duration
	// Debounce is the longest that a loop rests between two rounds, so that changes
	// that come close together are one round's work (default 10 ms). It rests as long
	// as the last round took: the first change after a quiet time is acted upon at once.
	Debounce time.Duration
	// UsageFile is where what services use is written down; empty: nowhere, and
	// recommendations begin anew with each start.
	UsageFile string
	// Events is how many events are kept (default 10,000).
	Events int
}

// Controller runs all controllers over one store.
type Controller struct {
	opts  Options
	store *store.Store
	log   *slog.Logger
	clock Clock

	// Events is what happened lately.
	Events *Events
	// Hosts knows the agents that are connected.
	Hosts *Hosts

	planMu sync.Mutex
	plan   *planState
	asking chan struct{} // holds the one question that is being answered

	randMu sync.Mutex
	trim   trimmer
	folder folder
	mover  mover
	away   map[string]time.Time // hosts, and since when restartLost sees them away
	lost   losses
	scaler scaler
	usages usages
	held   holds
	tombs  tombs
	// again wakes controllers for reasons that are no change of a record.
	again map[string]chan struct{}
	begun chan struct{} // closed by Run: agents may come
}

// New makes the controllers; Run starts them.
func New(o Options) (*Controller, error) {
	if o.Store == nil {
		return nil, fmt.Errorf("controllers without a store: %w", errdefs.ErrInvalidArgument)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Clock == nil {
		o.Clock = clock.System{}
	}
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if !o.ClusterCIDR.IsValid() {
		o.ClusterCIDR = netip.MustParsePrefix("10.64.0.0/10")
	}
	o.ClusterCIDR = o.ClusterCIDR.Masked()
	if o.NetworkBits == 0 {
		o.NetworkBits = 22
	}
	if !o.ClusterCIDR.Addr().Is4() || o.NetworkBits < o.ClusterCIDR.Bits() || o.NetworkBits > 26 {
		return nil, fmt.Errorf("cluster range %s can't be cut into /%d networks: %w", o.ClusterCIDR, o.NetworkBits, errdefs.ErrInvalidArgument)
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if err := o.Elasticity.Validate(); err != nil {
		return nil, err
	}
	def(&o.IdleStop, time.Minute)
	def(&o.ShrinkDelay, 3*time.Second)
	def(&o.FoldDelay, 5*time.Minute)
	def(&o.RestartDelay, 5*time.Minute)
	o.FoldsPerHour = cmp.Or(o.FoldsPerHour, 30)
	def(&o.HostGrace, 3*time.Second)
	def(&o.Debounce, 10*time.Millisecond)
	if o.Events == 0 {
		o.Events = 10000
	}
	c := &Controller{opts: o, store: o.Store, log: o.Logger, clock: o.Clock, Events: newEvents(o.Events)}
	c.Hosts = newHosts(c)
	c.plan, c.asking = newPlanState(c), make(chan struct{}, 1)
	c.again, c.begun = map[string]chan struct{}{}, make(chan struct{})
	for _, l := range c.loops() {
		c.again[l.name] = make(chan struct{}, 1)
	}
	return c, nil
}

// loop is one controller: what it does, and changes of which records wake it.
type loop struct {
	name  string
	run   func(context.Context) (time.Duration, error)
	kinds []store.Kind
}

func (c *Controller) loops() []loop {
	return []loop{
		{"deploy", c.deploy, []store.Kind{store.Projects, store.Services, store.Containers}},
		{"place", c.place, []store.Kind{store.Containers, store.Machines, store.Hosts, store.Volumes, store.Networks, store.Services, store.Policies}},
		{"trim", c.trimMachines, []store.Kind{store.Containers, store.Machines, store.Hosts}},
		{"collect", c.collect, []store.Kind{store.Projects, store.Services, store.Networks, store.Volumes, store.Containers, store.Machines}},
		{"lost", c.findLost, []store.Kind{store.Hosts}},
		{"restart", c.restartLost, []store.Kind{store.Hosts, store.Machines, store.Containers}},
		{"moves", c.moves, []store.Kind{store.Hosts, store.Containers}},
		{"fold", c.fold, []store.Kind{store.Hosts, store.Machines, store.Containers, store.Services}},
		{"scale", c.scaleServices, []store.Kind{store.Services}},
		{"observe", c.observe, []store.Kind{store.Services}},
	}
}

// Run, called once, runs the controllers until ctx ends or the store fails.
func (c *Controller) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := c.forgetConnections(ctx); err != nil {
		c.log.Warn("hosts may be said to be connected that are not", "err", err)
	}
	close(c.begun)
	var wg sync.WaitGroup
	wg.Go(func() { c.followEvents(ctx) })
	for _, l := range c.loops() {
		wg.Go(func() { c.loop(ctx, l) })
	}
	var err error
	select {
	case <-ctx.Done():
	case <-c.store.Failed():
		err = c.store.Err()
	}
	cancel()
	wg.Wait()
	c.closeUsage()
	return err
}

// loop runs a controller whenever a record that it looks at has changed, when it
// asked to be called again after a while, and, a little later each time, when it
// failed.
func (c *Controller) loop(ctx context.Context, l loop) {
	sub := c.store.Subscribe(false, l.kinds...)
	defer sub.Close()
	wake := c.again[l.name]
	backoff := 50 * time.Millisecond
	for {
		sub.Take()
		round := c.begin()
		next, err := l.run(ctx)
		if ctx.Err() != nil {
			return
		}
		round.end()
		if err == nil {
			backoff = 50 * time.Millisecond
		} else {
			if !errdefs.IsConflict(err) && !errdefs.IsAlreadyExists(err) {
				c.log.Warn("controller will try again", "controller", l.name, "err", err, "in", backoff)
			}
			next, backoff = backoff, min(backoff*2, 10*time.Second)
		}
		var timer <-chan time.Time
		if next > 0 {
			timer = c.clock.After(next)
		}
		select {
		case <-ctx.Done():
			return
		case <-wake:
		case <-timer:
			continue
		case <-sub.Ready():
		}
		if !round.rest(ctx) {
			return
		}
	}
}

// round is one pass of a loop that answers to changes. The next one begins when as
// much time has passed as this one took, at most Debounce: a change that comes
// alone is answered at once, a burst costs no more than half of a core.
type round struct {
	c          *Controller
	began, due time.Time
}

func (c *Controller) begin() *round { return &round{c: c, began: c.clock.Now()} }

func (r *round) end() {
	now := r.c.clock.Now()
	r.due = now.Add(min(now.Sub(r.began), r.c.opts.Debounce))
}

// rest returns when the next round may begin; false: ctx ended first.
func (r *round) rest(ctx context.Context) bool {
	if d := r.due.Sub(r.c.clock.Now()); d > 0 {
		return r.c.sleep(ctx, d)
	}
	return ctx.Err() == nil
}

// sleep waits for d; false: ctx ended first.
func (c *Controller) sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-c.clock.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// decision is one step that a controller has written down: what becomes of whom,
// and why.
type decision struct{ whom, what, why string }

// tell says what was decided, to who debugs the controllers; the transcripts in
// testdata are made of it.
func (c *Controller) tell(by string, all []decision) {
	for _, d := range all {
		c.log.Debug(d.what, "by", by, "whom", d.whom, "why", d.why)
	}
}

// poke lets a controller run though no record has changed.
func (c *Controller) poke(name string) {
	select {
	case c.again[name] <- struct{}{}:
	default:
	}
}

// NewID makes an id: n random bytes in hex.
func (c *Controller) NewID(n int) string {
	b := make([]byte, n)
	c.randMu.Lock()
	defer c.randMu.Unlock()
	if _, err := io.ReadFull(c.opts.Rand, b); err != nil {
		panic("no randomness: " + err.Error())
	}
	return hex.EncodeToString(b)
}

// retry runs fn again while somebody else wrote in between.
func retry(ctx context.Context, fn func() error) error {
	for i := 0; ; i++ {
		err := fn()
		if err == nil || i == 20 || ctx.Err() != nil || !errdefs.IsConflict(err) {
			return err
		}
	}
}

// Preview answers where containers that do not exist yet would go, once those
// named in gone are no more. Nothing is written.
func (c *Controller) Preview(ctx context.Context, fresh []*v1.Container, gone []string) (*planner.Plan, error) {
	return c.plan.preview(fresh, gone)
}
