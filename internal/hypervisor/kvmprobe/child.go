package kvmprobe

import (
	_ "embed" // the payload
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

//go:generate sh -c "gcc -c -o payload.o payload.S && objcopy -O binary -j .text payload.o payload.bin && rm payload.o"

//go:embed payload.bin
var payload []byte

// ioctl numbers of <linux/kvm.h>, x86-64.
const (
	kvmGetAPIVersion   = 0xae00
	kvmCreateVM        = 0xae01
	kvmGetVCPUMmapSize = 0xae04
	kvmCreateVCPU      = 0xae41
	kvmSetTSSAddr      = 0xae47
	kvmSetUserMemory   = 0x4020ae46
	kvmRun             = 0xae80
	kvmSetRegs         = 0x4090ae82
	kvmGetSregs        = 0x8138ae83
	kvmSetSregs        = 0x4138ae84
	kvmGetCPUID        = 0xc008ae05
	kvmSetCPUID        = 0x4008ae90
)

const (
	memory   = 32 << 20
	loadAddr = 1 << 20
	port     = 0xf4

	exitIO       = 2
	exitHalt     = 5
	exitShutdown = 8
	exitFail     = 9
	exitInternal = 17
)

type segment struct {
	base                                    uint64
	limit                                   uint32
	selector                                uint16
	typ, present, dpl, db, s, l, g, avl, un uint8
	_                                       uint8
}

type table struct {
	base  uint64
	limit uint16
	_     [3]uint16
}

type sregs struct {
	cs, ds, es, fs, gs, ss, tr, ldt segment
	gdt, idt                        table
	cr0, cr2, cr3, cr4, cr8         uint64
	efer, apicBase                  uint64
	interrupts                      [4]uint64
}

type regs struct {
	ax, bx, cx, dx, si, di, sp, bp       uint64
	r8, r9, r10, r11, r12, r13, r14, r15 uint64
	ip, flags                            uint64
}

type memoryRegion struct {
	slot, flags       uint32
	guest, size, host uint64
}

// childMain runs the payload, reports its progress on stdout, and exits.
func childMain(budget uint64) {
	runtime.LockOSThread()
	// The kernel kills us when the budget is used up: nothing in the guest can prevent it.
	lim := unix.Rlimit{Cur: budget, Max: budget}
	if err := unix.Setrlimit(unix.RLIMIT_CPU, &lim); err != nil {
		fmt.Fprintln(os.Stderr, "limit CPU time:", err)
		os.Exit(1)
	}
	if err := runPayload(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func ioctl(fd int, request uintptr, arg uintptr) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
		switch errno {
		case 0:
			return int(r), nil
		case unix.EINTR, unix.EAGAIN:
		default:
			return 0, errno
		}
	}
}

func runPayload() error {
	kvm, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if v, err := ioctl(kvm, kvmGetAPIVersion, 0); err != nil || v != 12 {
		return fmt.Errorf("API version %d (%v), need 12", v, err)
	}
	vm, err := ioctl(kvm, kvmCreateVM, 0)
	if err != nil {
		return fmt.Errorf("make a machine: %w", err)
	}
	if _, err := ioctl(vm, kvmSetTSSAddr, 0xfffbd000); err != nil {
		return fmt.Errorf("set TSS address: %w", err)
	}
	mem, err := unix.Mmap(-1, 0, memory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	region := memoryRegion{size: memory, host: uint64(uintptr(unsafe.Pointer(&mem[0])))}
	if _, err := ioctl(vm, kvmSetUserMemory, uintptr(unsafe.Pointer(&region))); err != nil {
		return fmt.Errorf("set memory: %w", err)
	}
	cpu, err := ioctl(vm, kvmCreateVCPU, 0)
	if err != nil {
		return fmt.Errorf("make a CPU: %w", err)
	}
	size, err := ioctl(kvm, kvmGetVCPUMmapSize, 0)
	if err != nil || size < 4096 {
		return fmt.Errorf("size of CPU state %d: %w", size, err)
	}
	state, err := unix.Mmap(cpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map CPU state: %w", err)
	}
	if err := prepare(kvm, cpu, mem); err != nil {
		return err
	}
	return follow(cpu, state)
}

// prepare puts the payload into memory and the CPU into 64-bit mode at its start.
func prepare(kvm, cpu int, mem []byte) error {
	put := func(addr int, v uint64) { binary.LittleEndian.PutUint64(mem[addr:], v) }
	copy(mem[loadAddr:], payload)
	const table = 3 // present, writable
	put(0x1000, 0x2000|table)
	put(0x2000, 0x3000|table)
	for i := range memory >> 21 {
		put(0x3000+8*i, uint64(i)<<21|0x80|table)
	}
	put(0x4008, 0x00af9b000000ffff) // code, 64 bits
	put(0x4010, 0x00cf93000000ffff) // data

	cpuid := make([]byte, 8+40*256)
	binary.LittleEndian.PutUint32(cpuid, 256)
	if _, err := ioctl(kvm, kvmGetCPUID, uintptr(unsafe.Pointer(&cpuid[0]))); err != nil {
		return fmt.Errorf("get CPUID: %w", err)
	}
	if _, err := ioctl(cpu, kvmSetCPUID, uintptr(unsafe.Pointer(&cpuid[0]))); err != nil {
		return fmt.Errorf("set CPUID: %w", err)
	}
	var s sregs
	if _, err := ioctl(cpu, kvmGetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return fmt.Errorf("get registers: %w", err)
	}
	s.cs = segment{limit: 0xffffffff, selector: 8, typ: 11, present: 1, s: 1, l: 1, g: 1}
	data := segment{limit: 0xffffffff, selector: 16, typ: 3, present: 1, db: 1, s: 1, g: 1}
	s.ds, s.es, s.fs, s.gs, s.ss = data, data, data, data, data
	s.gdt.base, s.gdt.limit = 0x4000, 23
	s.cr3 = 0x1000
	s.cr4 = 1<<5 | 1<<9 | 1<<10     // PAE, OSFXSR, OSXMMEXCPT
	s.cr0 = 1 | 1<<1 | 1<<5 | 1<<31 // PE, MP, NE, PG
	s.efer = 1<<8 | 1<<10           // LME, LMA
	if _, err := ioctl(cpu, kvmSetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return fmt.Errorf("set registers: %w", err)
	}
	r := regs{ip: loadAddr, sp: 0x7000, flags: 2}
	if _, err := ioctl(cpu, kvmSetRegs, uintptr(unsafe.Pointer(&r))); err != nil {
		return fmt.Errorf("set registers: %w", err)
	}
	return nil
}

// follow runs the CPU until the payload's last stage, copying its progress to stdout.
func follow(cpu int, state []byte) error {
	for {
		if _, err := ioctl(cpu, kvmRun, 0); err != nil {
			return fmt.Errorf("run: %w", err)
		}
		switch reason := binary.LittleEndian.Uint32(state[8:]); reason {
		case exitIO:
			if binary.LittleEndian.Uint16(state[34:]) != port {
				continue
			}
			off := binary.LittleEndian.Uint64(state[40:])
			if off >= uint64(len(state)) {
				return fmt.Errorf("strange I/O exit")
			}
			_, _ = os.Stdout.Write(state[off : off+1])
			if state[off] == 'z' {
				return nil
			}
		case exitHalt:
			return fmt.Errorf("guest code stopped: it computed a wrong result")
		case exitShutdown:
			return fmt.Errorf("triple fault")
		case exitFail, exitInternal:
			return fmt.Errorf("the hypervisor gave up (exit reason %d, code %d)", reason, binary.LittleEndian.Uint32(state[32:]))
		default:
			return fmt.Errorf("unexpected exit reason %d", reason)
		}
	}
}
