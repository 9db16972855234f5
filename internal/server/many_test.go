package server

import (
	"fmt"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "tandem/api/tandem/v1"
)

// thousand is a project of 1,000 containers in 10 services.
func thousand() *v1.ApplyProjectRequest {
	r := &v1.ApplyProjectRequest{Project: "big", Wait: true}
	for i := range 10 {
		r.Services = append(r.Services, &v1.ServiceSpec{Name: fmt.Sprint("s", i), Replicas: 100, Template: &v1.ContainerSpec{Image: "busybox",
			Resources: &v1.Resources{MemoryBytesReservation: 8 << 20, CpuMilliReservation: 1}}})
	}
	return r
}

// TestThousandContainers: all of them run, and a server that starts again knows
// them at once.
func TestThousandContainers(t *testing.T) {
	b := newBed(t, Options{})
	a := b.apply(thousand())
	if n := len(a.result.Containers); n != 1000 {
		t.Fatal(n, "containers")
	}
	ips := map[string]bool{}
	for _, c := range a.result.Containers {
		ips[c.Assignment.Ip] = true
	}
	if len(ips) != 1000 {
		t.Fatal(len(ips), "addresses for 1,000 containers")
	}
	applies := b.host.Applies()
	b.stop()
	began := time.Now()
	b.start()
	if n := len(b.list(false)); n != 1000 {
		t.Fatal(n, "containers after a restart")
	}
	t.Logf("answering with 1,000 containers %s after the start", time.Since(began).Round(time.Millisecond))
	// The host comes back and has nothing to do.
	for end := time.Now().Add(time.Minute); ; {
		res, err := b.system.Hosts(ctxOf(t), connect.NewRequest(&v1.ListHostsRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		if len(res.Msg.Hosts) == 1 && res.Msg.Hosts[0].Connected && b.host.Applies() > applies {
			break
		}
		if time.Now().After(end) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if got := b.apply(thousand()); !got.result.Unchanged {
		t.Error("an unchanged project changes after a restart")
	}
}

// BenchmarkList1000 is `tandem ps` of 1,000 containers, through the socket.
func BenchmarkList1000(b *testing.B) {
	bed := newBed(b, Options{})
	bed.apply(thousand())
	for b.Loop() {
		if n := len(bed.list(false)); n != 1000 {
			b.Fatal(n)
		}
	}
}

// BenchmarkRestart1000 is from a server's start to the first answer with 1,000
// containers known.
func BenchmarkRestart1000(b *testing.B) {
	bed := newBed(b, Options{})
	bed.apply(thousand())
	for b.Loop() {
		b.StopTimer()
		bed.stop()
		b.StartTimer()
		bed.start()
		if n := len(bed.list(false)); n != 1000 {
			b.Fatal(n)
		}
	}
}
