// Package qemu runs machines as QEMU processes on this host. It implements the
// contract of package hypervisor.
//
//	d, err := qemu.New(ctx, qemu.Options{StateDir: "/var/lib/tandem/vm", RunDir: "/run/tandem/vm"})
//	err = d.Create(ctx, hypervisor.MachineSpec{ID: "web", Kernel: k, Initrd: i, GuestVersion: v})
//	err = d.Start(ctx, "web", hypervisor.StartOptions{})
//	conn, err := d.Channel(ctx, "web") // bytes to the guest's port tandem.agent.0
//
// Programs that use it call kvmprobe.MaybeChild first in main.
//
// # Lives
//
// A QEMU process is no child that must be looked after: it has its own session,
// its own control group, its own user, and listens on sockets in RunDir. The
// driver may be killed at any instruction. What a machine should be is in
// StateDir (machines/ID/spec.json), what runs is in RunDir (ID/run.json); each
// is written atomically and before the step that it announces. New reads them,
// adopts what runs, and removes what a killed predecessor left half done; the
// control group is the truth about which processes belong to a machine.
//
// # Files
//
//	StateDir/lock                         held by the one driver of this directory
//	StateDir/kvm.json                     verdict of the KVM probe
//	StateDir/machines/ID/spec.json        the machine
//	StateDir/machines/ID/console.log[.1]  what the guest showed (bounded)
//	StateDir/machines/ID/qemu.log[.1]     what QEMU said
//	StateDir/machines/ID/ram              memory of a machine that will be a template
//	StateDir/templates/NAME/              manifest.json, memory, state
//	RunDir/ID/run.json                    process, devices, progress
//	RunDir/ID/{qmp,console,agent}.sock
//
// See docs/architecture/hypervisor.md for the invariants.
package qemu
