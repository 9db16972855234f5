package hypervisortest

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"tandem/internal/hypervisor"
)

func resize(t *T) {
	t.up("size")
	d, base, ceiling := t.Driver, t.Driver.Capabilities().Base, t.inspect("size").Spec.Ceiling
	try := func(want, expect hypervisor.Size) {
		t.Helper()
		got, err := d.Resize(t.ctx, "size", want)
		if err != nil || got != expect {
			t.Errorf("resize to %+v: %+v, %v", want, got, err)
		}
		if st := t.inspect("size"); st.Size != got {
			t.Errorf("status says %+v after resize to %+v", st.Size, got)
		}
	}
	more := hypervisor.Size{CPUs: base.CPUs + 1, Memory: base.Memory + 512<<20}
	try(hypervisor.Size{CPUs: more.CPUs}, hypervisor.Size{CPUs: more.CPUs, Memory: base.Memory})
	try(more, more)
	try(more, more)
	try(hypervisor.Size{Memory: more.Memory - 1}, more) // rounded up
	if t.Ready != nil {
		time.Sleep(500 * time.Millisecond) // a guest that has just got a CPU is busy bringing it up
	}
	try(hypervisor.Size{Memory: base.Memory + 256<<20}, hypervisor.Size{CPUs: more.CPUs, Memory: base.Memory + 256<<20})
	least := base
	if !d.Capabilities().ShrinkCPU {
		least.CPUs = more.CPUs // keeps what it has, without error
	}
	try(base, least)
	for _, bad := range []hypervisor.Size{{CPUs: ceiling.CPUs + 1}, {Memory: ceiling.Memory + 1<<30}, {CPUs: -1}, {Memory: base.Memory - 1<<26}} {
		_, err := d.Resize(t.ctx, "size", bad)
		t.want(errdefs.IsOutOfRange, err)
	}
}

func disks(t *T) {
	t.up("disks")
	t.up("disks2")
	d, rw, ro := t.Driver, t.Disk(8<<20), t.Disk(4<<20)
	data := hypervisor.Disk{ID: "data", Path: rw, Serial: "vol-1"}
	layer := hypervisor.Disk{ID: "layer.1", Path: ro, Serial: "img-1", ReadOnly: true}
	for range 2 {
		t.must(d.AttachDisk(t.ctx, "disks", data))
		t.must(d.AttachDisk(t.ctx, "disks", layer))
	}
	t.must(d.AttachDisk(t.ctx, "disks2", layer)) // shared
	if err := d.AttachDisk(t.ctx, "disks2", data); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a disk got a second writer: %v", err)
	}
	if st := t.inspect("disks2"); len(st.Disks) != 1 {
		t.Errorf("a disk that could not be attached is listed: %+v", st.Disks)
	}
	clash := data
	clash.Path = ro
	t.want(errdefs.IsAlreadyExists, d.AttachDisk(t.ctx, "disks", clash))
	if st := t.inspect("disks"); len(st.Disks) != 2 || st.Disks[0] != data || st.Disks[1] != layer {
		t.Errorf("attached: %+v", st.Disks)
	}
	for range 2 {
		t.must(d.DetachDisk(t.ctx, "disks", "data"))
	}
	t.must(d.AttachDisk(t.ctx, "disks2", data)) // free again
	t.must(d.DetachDisk(t.ctx, "disks", "layer.1"))
	t.must(d.AttachDisk(t.ctx, "disks", layer)) // a slot is used anew
	if st := t.inspect("disks"); len(st.Disks) != 1 {
		t.Errorf("left: %+v", st.Disks)
	}
	t.want(errdefs.IsInvalidArgument, d.AttachDisk(t.ctx, "disks", hypervisor.Disk{ID: "x", Path: ro, Serial: strings.Repeat("s", 37)}))
}

func nics(t *T) {
	t.up("nics")
	d := t.Driver
	n := hypervisor.NIC{ID: "eth0", Tap: t.Tap(), MAC: "52:54:00:12:34:56", MTU: 1450}
	for range 2 {
		t.must(d.AttachNIC(t.ctx, "nics", n))
	}
	clash := n
	clash.MAC = "52:54:00:12:34:57"
	t.want(errdefs.IsAlreadyExists, d.AttachNIC(t.ctx, "nics", clash))
	for _, mac := range []string{"", "x", "01:00:00:00:00:01", "52:54:00:12:34:56:78:90"} {
		t.want(errdefs.IsInvalidArgument, d.AttachNIC(t.ctx, "nics", hypervisor.NIC{ID: "bad", Tap: n.Tap, MAC: mac}))
	}
	second := hypervisor.NIC{ID: "eth1", Tap: t.Tap(), MAC: "52:54:00:12:34:58"}
	t.must(d.AttachNIC(t.ctx, "nics", second))
	for range 2 {
		t.must(d.DetachNIC(t.ctx, "nics", "eth0"))
	}
	if st := t.inspect("nics"); len(st.NICs) != 1 || st.NICs[0] != second {
		t.Errorf("left: %+v", st.NICs)
	}
	t.must(d.AttachNIC(t.ctx, "nics", n))
}

func channel(t *T) {
	t.up("chan")
	d := t.Driver
	first, err := d.Channel(t.ctx, "chan")
	t.must(err)
	t.must(t.Echo(t.ctx, first, "one"))
	second, err := d.Channel(t.ctx, "chan")
	t.must(err)
	defer second.Close()
	t.must(t.Echo(t.ctx, second, "two"))
	_ = first.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := first.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
		t.Errorf("the earlier channel still lives: %d, %v", n, err)
	}
	t.must(t.Driver.Stop(t.ctx, "chan", hypervisor.StopOptions{}))
	_ = second.SetReadDeadline(time.Now().Add(10 * time.Second))
	for {
		if _, err := second.Read(make([]byte, 100)); isTimeout(err) {
			t.Fatal("channel outlives its machine")
		} else if err != nil {
			break
		}
	}
}

func console(t *T) {
	t.must(t.Driver.Create(t.ctx, t.Spec("cons")))
	t.must(t.Driver.Start(t.ctx, "cons", hypervisor.StartOptions{})) // cold: it has something to say
	a, err := t.Driver.Console(t.ctx, "cons")
	t.must(err)
	b, err := t.Driver.Console(t.ctx, "cons")
	t.must(err)
	defer b.Close()
	t.ready("cons")
	t.eventually("console log", func() bool {
		log, err := t.Driver.ConsoleLog(t.ctx, "cons", 1<<20)
		return err == nil && len(log) > 10
	})
	if log, err := t.Driver.ConsoleLog(t.ctx, "cons", 5); err != nil || len(log) != 5 {
		t.Errorf("last 5 bytes: %q, %v", log, err)
	}
	_, err = a.Write([]byte("\r"))
	t.must(err)
	buf := make([]byte, 100)
	if n, err := b.Read(buf); err != nil || n == 0 {
		t.Errorf("the second console shows %d bytes, %v", n, err)
	}
	t.must(a.Close())
	if _, err := a.Write([]byte("x")); err == nil {
		t.Error("a closed console takes input")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if _, err := b.Read(buf); err != nil {
				return
			}
		}
	}()
	t.must(t.Driver.Stop(t.ctx, "cons", hypervisor.StopOptions{}))
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Error("console outlives its machine")
	}
}
