package agent

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor"
)

const templatePrefix = "tpl-"

// templateMachine tells machines that are being made into templates.
func templateMachine(id string) bool { return strings.HasPrefix(id, templatePrefix) }

// templates keeps one warm machine per guest version and ceiling, from which
// others are cloned. It is made in the background when the agent starts, and
// again after a clone did not work.
type templates struct {
	a *Agent

	mu     sync.Mutex
	ready  map[string]bool
	making string        // name
	began  time.Time     // of making
	done   chan struct{} // closed when making ends
	took   time.Duration // a cold boot's, measured or guessed
	kicked chan struct{}
}

func newTemplates(a *Agent) *templates {
	return &templates{a: a, ready: map[string]bool{}, took: a.o.Tuning.ColdBootGuess, kicked: make(chan struct{}, 1)}
}

var notInName = regexp.MustCompile(`[^a-z0-9]+`)

// templateName names the template that a machine could be cloned from.
func templateName(s hypervisor.MachineSpec) string {
	v := notInName.ReplaceAllString(strings.ToLower(s.GuestVersion), "")
	return fmt.Sprintf("g%s-%dc-%dm", v[:min(len(v), 24)], s.Ceiling.CPUs, s.Ceiling.Memory>>20)
}

func (t *templates) usable() bool {
	return !t.a.o.NoTemplate && t.a.o.Driver.Capabilities().Clone
}

// choose names the template to clone from, or "" for a cold boot. A template
// that is about to be ready is waited for when that is faster than booting.
func (t *templates) choose(ctx context.Context, spec hypervisor.MachineSpec) string {
	if !t.usable() {
		return ""
	}
	name := templateName(spec)
	t.mu.Lock()
	ready, making, done := t.ready[name], t.making == name, t.done
	left := t.took*5/4 - t.a.o.Clock.Now().Sub(t.began)
	took := t.took
	t.mu.Unlock()
	if ready {
		return name
	}
	if !making || left > took*2/3 {
		return ""
	}
	select {
	case <-done:
	case <-ctx.Done():
	case <-t.a.o.Clock.After(max(left, 0) + took/2):
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ready[name] {
		return name
	}
	return ""
}

// booted takes in how long a cold boot took.
func (t *templates) booted(took time.Duration) {
	t.mu.Lock()
	t.took = took
	t.mu.Unlock()
	t.kick()
}

// failed says that a clone did not work: the template is made anew.
func (t *templates) failed(name string, err error) {
	t.mu.Lock()
	was := t.ready[name]
	delete(t.ready, name)
	t.mu.Unlock()
	if was {
		t.a.log.Warn("a clone failed; its template is made anew", "template", name, "error", err)
		t.kick()
	}
}

func (t *templates) kick() {
	select {
	case t.kicked <- struct{}{}:
	default:
	}
}

// run makes what is missing until ctx ends.
func (t *templates) run(ctx context.Context) {
	if !t.usable() {
		return
	}
	if err := t.clean(ctx); err != nil {
		t.a.log.Warn("old templates stay until the next start", "error", err)
	}
	var retry backoff
	for ctx.Err() == nil {
		err := t.ensure(ctx)
		var timer <-chan time.Time
		if err != nil && ctx.Err() == nil {
			wait := retry.next(30*time.Second, 30*time.Minute)
			t.a.log.Warn("no template for fast clones; machines boot cold", "error", err, "retry", wait)
			timer = t.a.o.Clock.After(wait)
		} else {
			retry.reset()
		}
		select {
		case <-ctx.Done():
		case <-t.kicked:
		case <-timer:
		}
	}
}

// clean forgets templates of other guests, and finds those that are there.
func (t *templates) clean(ctx context.Context) error {
	drv := t.a.o.Driver
	names, err := drv.Templates(ctx)
	if err != nil {
		return err
	}
	list, err := drv.List(ctx)
	if err != nil {
		return err
	}
	used := map[string]bool{}
	for _, st := range list {
		if st.Template != "" && (st.State == hypervisor.Running || st.State == hypervisor.Paused) {
			used[st.Template] = true
		}
	}
	mine := templateName(t.a.machineSpec("x", nil))
	for _, n := range names {
		if n == mine {
			t.mu.Lock()
			t.ready[n] = true
			t.mu.Unlock()
		} else if !used[n] {
			if err := drv.DeleteTemplate(ctx, n); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	return nil
}

// ensure makes the template of today's guest if there is none that works.
func (t *templates) ensure(ctx context.Context) (err error) {
	id, err := randomID(t.a.o.Rand, templatePrefix)
	if err != nil {
		return err
	}
	drv := t.a.o.Driver
	spec := t.a.machineSpec(id, nil)
	name := templateName(spec)
	t.mu.Lock()
	if t.ready[name] {
		t.mu.Unlock()
		return nil
	}
	done := make(chan struct{})
	t.making, t.began, t.done = name, t.a.o.Clock.Now(), done
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		t.making = ""
		t.ready[name] = err == nil
		close(done)
		t.mu.Unlock()
		if err != nil {
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			if derr := drv.Delete(clean, id); derr != nil && !errdefs.IsNotFound(derr) {
				t.a.log.Warn("a half-made template stays until the next start", "machine", id, "error", derr)
			}
		}
	}()
	if err := drv.DeleteTemplate(ctx, name); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete the template that does not work: %w", err)
	}
	if err := drv.Create(ctx, spec); err != nil {
		return fmt.Errorf("create a machine for the template: %w", err)
	}
	if err := drv.Start(ctx, id, hypervisor.StartOptions{ForTemplate: true}); err != nil {
		return fmt.Errorf("start a machine for the template: %w", err)
	}
	boot, cancel := context.WithTimeout(ctx, t.a.o.Tuning.BootTimeout)
	defer cancel()
	link, _, err := t.a.reachSoon(boot, id)
	if err != nil {
		return fmt.Errorf("machine for the template: %w", err)
	}
	took := t.a.o.Clock.Now().Sub(t.began)
	_, err = link.Guest.Quiesce(boot, connect.NewRequest(&v1.QuiesceRequest{}))
	link.Close()
	if err != nil {
		return fmt.Errorf("quiesce the machine for the template: %w", err)
	}
	t.mu.Lock()
	t.took = took
	t.mu.Unlock()
	if err := drv.SaveTemplate(boot, id, name); err != nil {
		return fmt.Errorf("save the template: %w", err)
	}
	t.a.log.Info("fast clones are ready", "template", name, "took", t.a.o.Clock.Now().Sub(t.began))
	return nil
}

// isReady says whether today's guest can be cloned.
func (t *templates) isReady() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ready[templateName(t.a.machineSpec("x", nil))]
}
