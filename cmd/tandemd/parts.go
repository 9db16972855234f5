package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/agent"
	"tandem/internal/doctor"
	"tandem/internal/guestimage"
	"tandem/internal/hypervisor/qemu"
	"tandem/internal/image"
	"tandem/internal/network/endpoint"
	"tandem/internal/network/hostnet"
	"tandem/internal/network/names"
	"tandem/internal/runtime/monitor"
	"tandem/internal/runtime/oci"
	"tandem/internal/spawn"
	"tandem/internal/volume"
)

// parts are what an agent works with on this host.
type parts struct {
	driver  *qemu.Driver
	metal   *oci.Runtime
	net     *hostnet.Host
	images  *image.LocalStore
	volumes *volume.LocalStore
	closers []func() error
}

func (p *parts) close() error {
	var errs []error
	for i := len(p.closers) - 1; i >= 0; i-- {
		errs = append(errs, p.closers[i]())
	}
	return errors.Join(errs...)
}

// openParts opens the hypervisor, the metal runtime, images, volumes and network.
func openParts(ctx context.Context, d *dirs, accel string, log *slog.Logger) (_ *parts, err error) {
	p := &parts{}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	sub := func(name string) string { return filepath.Join(d.state, name) }
	group, err := d.workloads()
	if err != nil {
		return nil, err
	}
	if p.driver, err = qemu.New(ctx, qemu.Options{StateDir: sub("machines"), RunDir: filepath.Join(d.run, "m"), Accel: accel,
		CgroupParent: group + "/machines", Logger: log.With("part", "qemu")}); err != nil {
		return nil, fmt.Errorf("hypervisor: %w", err)
	}
	p.closers = append(p.closers, p.driver.Close)
	if p.images, err = image.Open(sub("images"), image.Options{Logger: log.With("part", "image")}); err != nil {
		return nil, err
	}
	p.closers = append(p.closers, p.images.Close)
	if p.volumes, err = volume.Open(sub("volumes"), volume.Options{Logger: log.With("part", "volume")}); err != nil {
		return nil, err
	}
	p.closers = append(p.closers, p.volumes.Close)
	nameServer, err := d.nameServer(group, log.With("part", "names"))
	if err != nil {
		return nil, fmt.Errorf("name server: %w", err)
	}
	if p.net, err = hostnet.New(hostnet.Options{Table: d.instance(), Names: nameServer, Logger: log.With("part", "network")}); err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	p.closers = append(p.closers, p.net.Close)
	if p.metal, err = d.openMetal(ctx, group, log); err != nil {
		return nil, fmt.Errorf("containers on metal: %w", err)
	}
	p.closers = append(p.closers, p.metal.Close)
	return p, nil
}

func (d *dirs) monitorSocket() string { return filepath.Join(d.run, "monitor.sock") }

func (d *dirs) namesSocket() string { return filepath.Join(d.run, "names.sock") }

// nameServer is the client of this host's name server, which is a process of its own.
func (d *dirs) nameServer(group string, log *slog.Logger) (*names.Apart, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	identity, err := names.Identity()
	if err != nil {
		return nil, err
	}
	start := spawn.Session([]string{exe, "names", "--state-dir", d.state, "--run-dir", d.run, "--identity", identity}, filepath.Join(d.state, "names.log"), groupFor(group, "names"))
	return names.NewApart(names.ApartOptions{Socket: d.namesSocket(), Spawn: start, Identity: identity, Logger: log}), nil
}

func (d *dirs) openMetal(ctx context.Context, group string, log *slog.Logger) (*oci.Runtime, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	links, err := endpoint.New(endpoint.Options{NetnsDir: filepath.Join(d.run, "netns"), Prefix: endpoint.InstancePrefix(d.instance()), RouteLocalnet: true, Spare: true})
	if err != nil {
		return nil, err
	}
	mon := monitor.NewClient(d.monitorSocket(), spawn.Session([]string{exe, "monitor", "--state-dir", d.state, "--run-dir", d.run}, filepath.Join(d.state, "monitor.log"), groupFor(group, "monitor")))
	return oci.New(ctx, oci.Options{
		StateDir: filepath.Join(d.state, "metal"), RunDir: filepath.Join(d.run, "metal"), Runc: filepath.Join(d.lib, "runc"),
		Monitor: mon, Endpoint: links, CgroupParent: group + "/containers", Metal: true, InitPath: exe, Logger: log.With("part", "metal"),
	})
}

// newAgent makes the agent of this host.
func newAgent(d *dirs, p *parts, o agentFlags, log *slog.Logger) (*agent.Agent, error) {
	m, err := guestimage.Load(filepath.Join(d.lib, "guest"))
	if err != nil {
		return nil, err
	}
	opts := agent.Options{
		StateDir: filepath.Join(d.state, "agent"), RunDir: d.run, HostName: o.name, Zone: o.zone, Version: version,
		Driver: p.driver, Metal: p.metal, Images: p.images, Volumes: p.volumes, Network: p.net,
		Guest:      agent.Guest{Kernel: m.Kernel, Initrd: m.Initrd, Version: m.Version},
		NoTemplate: o.noTemplate, Logger: log.With("part", "agent"),
		Doctor: func(ctx context.Context) []*v1.Finding { return doctor.Check(ctx, doctorOptions(d)) },
	}
	if opts.Capacity, err = o.capacity(); err != nil {
		return nil, err
	}
	return agent.New(opts)
}

func doctorOptions(d *dirs) doctor.Options { return doctor.Options{StateDir: d.state} }
