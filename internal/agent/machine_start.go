package agent

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor"
	"tandem/internal/network"
)

const guestProtocol = 1

var hostName = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?$`)

// start makes the machine run: a clone of the warm template where there is one,
// else a cold boot. It returns with a session.
func (m *machine) start(ctx, soft context.Context, want *v1.MachineAssignment) error {
	m.state = v1.MachineState_MACHINE_STATE_STARTING
	m.kernel.setDown("it is starting", false)
	m.message = ""
	m.publish(want)
	m.tell("starting", false, nil)
	err := m.startVMM(soft, want)
	if err == nil {
		err = m.connect(ctx, soft, want)
	}
	if err != nil {
		m.tell("starting", false, err)
		return err
	}
	m.tell(m.rec.StartMethod, true, nil)
	m.a.hub.event(m.newEvent("start", "method", m.rec.StartMethod, "seconds", fmt.Sprintf("%.2f", m.rec.StartTook.Seconds())))
	if m.rec.StartMethod == "boot" {
		m.a.templates.booted(m.rec.StartTook)
	}
	return nil
}

func (m *machine) startVMM(ctx context.Context, want *v1.MachineAssignment) error {
	drv := m.a.o.Driver
	spec := m.a.machineSpec(m.id, want.Ceiling)
	err := drv.Create(ctx, spec)
	if errdefs.IsAlreadyExists(err) { // another guest version or ceiling, and it does not run: make it anew
		if err = drv.Delete(ctx, m.id); err == nil {
			err = drv.Create(ctx, spec)
		}
	}
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if err := m.freshScratch(ctx); err != nil {
		return err
	}
	template := m.a.templates.choose(ctx, spec)
	m.rec.Boots++
	m.rec.Started, m.rec.StartTook = true, 0
	m.rec.StartMethod = "boot"
	m.save()
	begin := m.a.o.Clock.Now()
	if template != "" {
		if err = drv.Start(ctx, m.id, hypervisor.StartOptions{Template: template}); err == nil {
			m.rec.StartMethod = "clone"
		} else {
			m.log.Info("no clone; the machine boots cold", "template", template, "error", err)
			m.a.templates.failed(template, err)
		}
	}
	if m.rec.StartMethod == "boot" {
		begin = m.a.o.Clock.Now()
		err = drv.Start(ctx, m.id, hypervisor.StartOptions{})
	}
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	m.startedAt(begin)
	if m.status, err = drv.Inspect(ctx, m.id); err != nil {
		return fmt.Errorf("look at the machine: %w", err)
	}
	m.kernel.disks.reset(m.boot())
	m.kernel.wakeAll() // layers may be attached from now on
	return nil
}

// freshScratch drops a scratch disk that was not left in order: it has no
// journal, and what a crashed guest wrote last is not on it. Its containers are
// made anew. After an orderly stop writable layers and logs stay.
func (m *machine) freshScratch(ctx context.Context) error {
	if m.rec.Clean || !m.rec.Started {
		return nil
	}
	scratch := scratchID(m.id)
	if err := m.a.o.Volumes.Unuse(ctx, scratch, m.id); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("scratch disk: %w", err)
	}
	if err := m.a.o.Volumes.Remove(ctx, scratch); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("scratch disk: %w", err)
	}
	return nil
}

// scratchInUse notes, before the guest learns which disk it may write to, that it is
// whole only after the next orderly stop. A guest that hangs before that costs nothing.
func (m *machine) scratchInUse() error {
	if !m.rec.Clean {
		return nil
	}
	m.rec.Clean = false
	if err := saveRecord(m.a.state, "machines", m.id, m.rec); err != nil {
		m.rec.Clean = true
		return fmt.Errorf("the machine's record can't be written, and without it nothing may be written in the machine: %w", err)
	}
	return nil
}

// startedAt notes when the VMM began and how long its guest may take.
func (m *machine) startedAt(begin time.Time) {
	m.begin, m.alive = begin, true
	wait := m.a.o.Tuning.BootTimeout
	m.cloned = m.rec.StartMethod == "clone"
	if m.cloned {
		wait /= 3
	}
	m.patience = begin.Add(wait)
}

// connect reaches the guest, gives it its identity, disks, network and size,
// and opens the session. It tries until the machine's patience is at its end.
func (m *machine) connect(ctx, soft context.Context, want *v1.MachineAssignment) error {
	clock := m.a.o.Clock
	delay := 20 * time.Millisecond
	for {
		err := m.connectOnce(ctx, soft, want)
		if err == nil {
			m.patience, m.cloned = time.Time{}, false
			return nil
		}
		if soft.Err() != nil {
			return err
		}
		if st, ierr := m.a.o.Driver.Inspect(ctx, m.id); errdefs.IsNotFound(ierr) || ierr == nil && st.State != hypervisor.Running && st.State != hypervisor.Paused {
			m.down("its VMM ended")
			return fmt.Errorf("the VMM ended: %s: %w", cut(st.Message, 1024), errdefs.ErrUnavailable)
		}
		now := clock.Now()
		if now.After(m.patience) {
			what := "the guest did not answer in time"
			if m.cloned {
				m.a.templates.failed(m.status.Template, err)
				what = "the clone did not answer in time; it boots cold now"
			}
			if kerr := m.kill(ctx, what); kerr != nil {
				return kerr
			}
			m.rec.Restarts++
			m.poke()
			return fmt.Errorf("%s: %w", what, err)
		}
		if m.rec.StartTook != 0 && m.state == v1.MachineState_MACHINE_STATE_RUNNING &&
			m.patience.Sub(now) < m.a.o.Tuning.BootTimeout*2/3 {
			m.state = v1.MachineState_MACHINE_STATE_UNREACHABLE
			m.message = cut(err.Error(), 1024)
			m.kernel.setDown(m.kernel.String()+" does not answer", true)
			m.publish(want)
		}
		m.log.Debug("the guest can't be reached yet", "error", err)
		select {
		case <-soft.Done():
			return soft.Err()
		case <-clock.After(delay):
		}
		delay = min(2*delay, time.Second)
	}
}

// connectOnce is one attempt.
func (m *machine) connectOnce(ctx, soft context.Context, want *v1.MachineAssignment) (err error) {
	m.closeLink()
	t := m.a.o.Tuning
	try, cancel := context.WithTimeout(soft, max(t.CallTimeout, t.BootTimeout))
	defer cancel()
	// A clone is plugged while its guest is being reached: its kernel is up, and
	// takes a while to see a device. A guest that boots is left alone until it answers.
	plugging, giveUp := context.WithCancel(try)
	defer giveUp()
	g, gctx := errgroup.WithContext(plugging)
	plug := func() {
		g.Go(func() error { return m.attachNIC(gctx, want) })
		g.Go(func() error { return m.attachScratch(gctx) })
	}
	early := m.cloned
	if early {
		plug()
	}
	link, hello, err := m.a.reach(try, m.id)
	if err != nil {
		giveUp()
		_ = g.Wait() // the next attempt tells
		return err
	}
	defer func() {
		if err != nil {
			link.Close()
		}
	}()
	if m.rec.StartTook == 0 {
		begin := m.begin
		if begin.IsZero() { // an earlier agent started it, and did not live to see it answer
			begin = m.status.StartedAt
		}
		if begin.IsZero() {
			begin = m.a.o.Clock.Now()
		}
		m.rec.StartTook = max(m.a.o.Clock.Now().Sub(begin), time.Nanosecond)
		m.save()
	}
	m.mu.Lock()
	m.version, m.misses = cut(hello.Version, 128), 0
	m.mu.Unlock()
	if err := m.scratchInUse(); err != nil {
		return err
	}
	boot := m.boot()

	// NIC and identity at once; the guest waits for its disk by itself.
	if !early {
		plug()
	}
	g.Go(func() error { return m.configure(gctx, link, hello) })
	if err := g.Wait(); err != nil {
		return err
	}
	m.network = ""
	sctx, end := context.WithCancel(ctx)
	sess := &session{rt: link.Runtime, guest: link.Guest, boot: boot, ctx: sctx, end: end, linked: make(chan struct{}),
		turns: startsAtOnce(m.status.Size.CPUs)}
	opening := context.AfterFunc(try, end) // the first listing has a deadline, too
	err = m.kernel.open(sess)
	why := "it could not be listed"
	if err == nil { // containers are made meanwhile; they start when their network is there
		why = "its network could not be configured"
		err = m.configureNetwork(try, link, want)
	}
	if !opening() && err == nil {
		err = errGone
	}
	if err != nil {
		m.kernel.close(sess, why)
		end()
		return err
	}
	close(sess.linked)
	m.link = link
	m.state = v1.MachineState_MACHINE_STATE_RUNNING
	m.resized.reset()
	m.resizeAt, m.resizeGap = time.Time{}, ""
	go m.watchSession(sess, link)
	return nil
}

// attachScratch makes the machine's scratch disk and plugs it.
func (m *machine) attachScratch(ctx context.Context) error {
	scratch := scratchID(m.id)
	vol, err := m.a.o.Volumes.EnsureScratch(ctx, scratch, m.a.o.Tuning.ScratchSize)
	if err != nil {
		return fmt.Errorf("scratch disk: %w", err)
	}
	d := disk{Name: volumeDisk(scratch), Path: vol.Path, FSType: "ext4", Volume: scratch}
	m.kernel.disks.hold(scratch, []disk{d})
	if err := m.kernel.disks.attachAll(ctx, scratch); err != nil {
		return fmt.Errorf("scratch disk: %w", err)
	}
	return nil
}

// configure gives the guest its identity and names its scratch disk, if it has
// none yet.
func (m *machine) configure(ctx context.Context, link *GuestLink, hello *v1.GuestHelloResponse) error {
	if hello.Configured && hello.MachineId == m.id {
		return nil
	}
	entropy := make([]byte, 256)
	if _, err := io.ReadFull(m.a.o.Rand, entropy); err != nil {
		return fmt.Errorf("entropy for the guest: %w", err)
	}
	call, cancel := context.WithTimeout(ctx, 3*m.a.o.Tuning.CallTimeout)
	defer cancel()
	m.mu.Lock()
	name := m.want.GetName()
	if !hostName.MatchString(name) {
		name = m.id
	}
	m.mu.Unlock()
	_, err := link.Guest.Configure(call, connect.NewRequest(&v1.ConfigureRequest{
		MachineId: m.id, Hostname: name, Entropy: entropy, Now: timestamppb.New(m.a.o.Clock.Now()), ScratchSerial: volumeDisk(scratchID(m.id)),
	}))
	if err != nil {
		return fmt.Errorf("configure the guest: %w", err)
	}
	return nil
}

// attachNIC plugs the machine's NIC; its tap is made by the host's network.
func (m *machine) attachNIC(ctx context.Context, want *v1.MachineAssignment) error {
	if want.Mac == "" {
		return nil
	}
	for _, n := range m.status.NICs {
		if n.ID == nicID {
			return nil
		}
	}
	if err := m.a.net.ready(ctx); err != nil {
		return fmt.Errorf("network of this host: %w", err)
	}
	nic := hypervisor.NIC{ID: nicID, Tap: m.a.o.Network.TapName(m.id), MAC: want.Mac, MTU: m.a.mtu()}
	if err := m.a.o.Driver.AttachNIC(ctx, m.id, nic); err != nil {
		return fmt.Errorf("attach the NIC: %w", err)
	}
	m.status.NICs = append(m.status.NICs, nic)
	return nil
}

const nicID = "net0"

// configureNetwork tells the guest its links, when they changed.
func (m *machine) configureNetwork(ctx context.Context, link *GuestLink, want *v1.MachineAssignment) error {
	if want.Mac == "" {
		return nil
	}
	req := &v1.ConfigureNetworkRequest{
		Nics: []*v1.GuestNIC{{Mac: want.Mac, Gateway: network.Gateway, Mtu: uint32(m.a.mtu()), ContainerPrefixes: want.Prefixes}},
		// Every guest asks the host's name server.
		DnsServers: []string{network.Gateway},
	}
	key := hashProto(req)
	if key == m.network {
		return nil
	}
	call, cancel := context.WithTimeout(ctx, m.a.o.Tuning.CallTimeout)
	defer cancel()
	if _, err := link.Guest.ConfigureNetwork(call, connect.NewRequest(req)); err != nil {
		return fmt.Errorf("configure the guest's network: %w", err)
	}
	m.network = key
	return nil
}

// tell reports the start as progress.
func (m *machine) tell(action string, done bool, err error) {
	p := &v1.Progress{Id: "machine " + m.id, Action: action, Done: done, At: timestamppb.New(m.a.o.Clock.Now())}
	if err != nil {
		p.Failed, p.Message = true, cut(err.Error(), 1024)
	}
	m.a.hub.setProgress(p)
}

func shutdownRequest(grace time.Duration) *connect.Request[v1.ShutdownRequest] {
	return connect.NewRequest(&v1.ShutdownRequest{Timeout: durationpb.New(grace)})
}
