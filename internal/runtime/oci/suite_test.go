package oci_test

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/rpc"
	"tandem/internal/runtime"
	"tandem/internal/runtime/remote"
	"tandem/internal/runtime/runtimetest"
)

func (h *host) target(rt runtime.Runtime) runtimetest.Target {
	return runtimetest.Target{RT: rt, Layer: h.layer, Mount: func(t *testing.T) string {
		id := runtimetest.Unique("disk")
		path := filepath.Join(h.dir, id+".img")
		runtimetest.Ext4(t, path, 16<<20, "")
		if _, err := rt.Mount(runtimetest.Context(t), &v1.MountDiskRequest{Id: id, Path: path}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := rt.Unmount(ctx, id); err != nil {
				t.Errorf("unmount: %v", err)
			}
		})
		return id
	}}
}

func TestSuite(t *testing.T) {
	h := newHost(t)
	runtimetest.Run(t, h.target(h.open()))
}

func TestLinux(t *testing.T) {
	h := newHost(t)
	runtimetest.Linux(t, h.target(h.open()))
}

// TestRemote runs both suites through the wire, as a guest's containers are reached.
func TestRemote(t *testing.T) {
	h := newHost(t)
	rt := h.open()
	a, b := net.Pipe()
	mux := http.NewServeMux()
	mux.Handle(remote.NewHandler(rt))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go rpc.ServeConn(ctx, a, mux)
	c, err := rpc.ConnClient(b, time.Minute, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	tg := h.target(rt)
	tg.RT = remote.NewClient(c.Client, rpc.BaseURL)
	runtimetest.Run(t, tg)
	runtimetest.Linux(t, tg)
}
