package qemu

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"tandem/internal/hypervisor"
)

// PortName is the name of the virtio-serial port that Channel speaks on.
const PortName = "tandem.agent.0"

// memoryKind is where a machine's base memory lives.
type memoryKind int

const (
	memoryAnonymous memoryKind = iota // of its own; goes back to the host when the guest frees it
	memoryTemplate                    // a file that is written through: it will be a template
	memoryClone                       // a private mapping of a template's sealed memory
)

// launch is all that a command line depends on.
type launch struct {
	id       string
	tag      string
	spec     hypervisor.MachineSpec // with its ceiling filled in
	accel    string
	tb       int64 // translation cache, bytes
	memory   memoryKind
	incoming bool
	// Numbers of the descriptors that the process finds open.
	kernelFD, initrdFD, qmpFD, consoleFD, agentFD, logFD, ramFD int
}

// cpuModel is the CPU that guests see. Under TCG: the oldest that today's
// distributions are built for (x86-64-v2), plus hardware randomness, which the
// guest's kernel needs to have any at boot, and AES.
func cpuModel(accel string) string {
	if accel == "kvm" {
		return "host"
	}
	return "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand,+aes,+pclmulqdq,-svm"
}

// kernelCommandLine is what every guest kernel is booted with. Without
// swiotlb=noforce a kernel that may get more than 4 GiB one day sets 64 MiB of
// its 256 aside for devices that can't address it; there are none.
const kernelCommandLine = "swiotlb=noforce console=ttyS0 quiet panic=-1 reboot=t cryptomgr.notests no_timer_check random.trust_cpu=on 8250.nr_uarts=1 audit=0"

// hardware are the arguments that decide what the guest finds: the same for
// each start of a machine, for a template and its clones, and for the far side
// of a live migration. Every id and PCI address is fixed.
func (l launch) hardware() []string {
	grow := l.spec.Ceiling.Memory - baseMemory
	a := []string{
		"-machine", "q35,memory-backend=ram0,sata=off,smbus=off,i8042=off,hpet=off,vmport=off",
		"-cpu", cpuModel(l.accel),
		"-bios", "qboot.rom",
		"-m", fmt.Sprintf("size=%dM,slots=1,maxmem=%dM", baseMemory/mib, l.spec.Ceiling.Memory/mib),
		"-smp", fmt.Sprintf("cpus=%d,maxcpus=%d,sockets=1,cores=%d,threads=1", baseCPUs, l.spec.Ceiling.CPUs, l.spec.Ceiling.CPUs),
		"-object", "iothread,id=io0",
		"-device", "virtio-serial-pci,id=vser0,bus=pcie.0,addr=0x4,max_ports=2",
		"-device", "virtserialport,id=agent0,bus=vser0.0,nr=1,chardev=agent,name=" + PortName,
		"-device", "virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=0x5,iothread=io0",
		"-device", "isa-serial,id=serial0,chardev=console",
		"-device", "pvpanic,id=panic0",
	}
	if grow > 0 {
		a = append(a,
			"-object", fmt.Sprintf("memory-backend-ram,id=vmem0,size=%dM,reserve=off", grow/mib),
			"-device", fmt.Sprintf("virtio-mem-pci,id=vm0,bus=pcie.0,addr=0x8,memdev=vmem0,block-size=%dM,requested-size=0", memoryStep/mib))
	}
	if l.memory == memoryAnonymous {
		// Never with a template's memory: what a clone reports as free would be
		// punched out of the file that it shares.
		a = append(a, "-device", "virtio-balloon-pci,id=balloon0,bus=pcie.0,addr=0x6,free-page-reporting=on")
	}
	for i := range maxNICs {
		a = append(a, "-device", fmt.Sprintf("pcie-root-port,id=rp%d,bus=pcie.0,chassis=%d,slot=%d,addr=0x%x", i, i+1, i+1, 0x10+i))
	}
	return a
}

// digest names the hardware: equal digests can take each other's state.
func (l launch) digest() string {
	h := sha256.Sum256([]byte(strings.Join(l.hardware(), "\x00") + "\x00" + l.spec.Cmdline))
	return hex.EncodeToString(h[:12])
}

// args is the command line after the binary's name.
func (l launch) args() []string {
	accel := "kvm"
	if l.accel == "tcg" {
		accel = fmt.Sprintf("tcg,thread=multi,tb-size=%d", l.tb/mib)
	}
	ram := fmt.Sprintf("memory-backend-ram,id=ram0,size=%dM", baseMemory/mib)
	switch l.memory {
	case memoryTemplate:
		ram = fmt.Sprintf("memory-backend-file,id=ram0,size=%dM,mem-path=/proc/self/fd/%d,share=on", baseMemory/mib, l.ramFD)
	case memoryClone:
		ram = fmt.Sprintf("memory-backend-file,id=ram0,size=%dM,mem-path=/proc/self/fd/%d,share=off", baseMemory/mib, l.ramFD)
	}
	a := []string{
		"-name", fmt.Sprintf("guest=%s.%s,debug-threads=on", l.tag, l.id),
		"-accel", accel,
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-rtc", "base=utc",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-kernel", fmt.Sprintf("/proc/self/fd/%d", l.kernelFD),
		"-initrd", fmt.Sprintf("/proc/self/fd/%d", l.initrdFD),
		"-append", strings.TrimSpace(kernelCommandLine + " " + l.spec.Cmdline),
		"-add-fd", fmt.Sprintf("fd=%d,set=1", l.logFD),
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", l.qmpFD),
		"-mon", "chardev=qmp,mode=control",
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d,server=on,wait=off,logfile=/dev/fdset/1,logappend=on", l.consoleFD),
		"-chardev", fmt.Sprintf("socket,id=agent,fd=%d,server=on,wait=off", l.agentFD),
		"-object", ram,
	}
	a = append(a, l.hardware()...)
	if l.incoming {
		a = append(a, "-incoming", "defer")
	}
	return a
}
