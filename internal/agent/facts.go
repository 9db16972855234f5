package agent

import (
	"bufio"
	"fmt"
	"os"
	goruntime "runtime"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

const mib = 1 << 20

// What a machine costs beside what its containers use, until it was measured.
const (
	vmmOverheadKVM = 60 * mib
	vmmOverheadTCG = 100 * mib // with the translator's buffer
	guestOverhead  = 112 * mib // kernel, modules, tandem-guest
)

// facts is what the host can do, for the server.
func (a *Agent) facts() (*v1.HostFacts, error) {
	caps := a.o.Driver.Capabilities()
	overhead := int64(vmmOverheadKVM)
	if caps.Accelerator == "tcg" {
		overhead = vmmOverheadTCG
	}
	f := &v1.HostFacts{
		HostId: a.hostID, Hostname: a.o.HostName, Zone: a.o.Zone, Version: a.o.Version,
		Accelerator: caps.Accelerator, GuestVersion: a.o.Guest.Version,
		Kernel: firstLine("/proc/sys/kernel/osrelease"), BootId: a.bootID,
		MachineOverhead: &v1.Size{MemoryBytes: overhead}, GuestOverhead: &v1.Size{MemoryBytes: guestOverhead},
		BaseMemoryBytes: caps.Base.Memory,
		Capabilities: &v1.Capabilities{
			GrowCpu: caps.GrowCPU, ShrinkCpu: caps.ShrinkCPU, GrowMemory: caps.GrowMemory, ShrinkMemory: caps.ShrinkMemory,
			HotDisk: caps.HotDisk, HotNic: caps.HotNIC, Clone: caps.Clone, Metal: a.o.Metal != nil,
			MaxMachine:      &v1.Size{CpuMilli: int64(caps.Max.CPUs) * 1000, MemoryBytes: caps.Max.Memory},
			MemoryStepBytes: caps.MemoryStep, MaxDisks: int32(caps.MaxDisks),
		},
	}
	if a.o.Capacity != nil {
		f.Capacity = proto.Clone(a.o.Capacity).(*v1.Size)
		if f.Capacity.CpuMilli > 0 && f.Capacity.MemoryBytes > 0 {
			return f, nil
		}
	}
	mem, err := memTotal()
	if err != nil {
		return nil, err
	}
	// What the host itself and Tandem's own processes need.
	reserve := max(512*mib, mem/20)
	all := &v1.Size{CpuMilli: int64(goruntime.NumCPU()) * 1000, MemoryBytes: max(mem-reserve, mem/2)}
	if f.Capacity == nil {
		f.Capacity = all
	}
	// Who says only one of the two leaves the other as it is.
	if f.Capacity.CpuMilli == 0 {
		f.Capacity.CpuMilli = all.CpuMilli
	}
	if f.Capacity.MemoryBytes == 0 {
		f.Capacity.MemoryBytes = all.MemoryBytes
	}
	return f, nil
}

// measuredOverhead takes in what a guest says its own part uses. It only
// corrects the estimate: within sane bounds, and in large steps, so that the
// planner's figures don't tremble.
func (a *Agent) measuredOverhead(bytes int64) {
	const step = 16 * mib
	if bytes <= 0 {
		return
	}
	bytes = min(max((bytes+step-1)/step*step, 48*mib), 256*mib)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.hostFacts.GuestOverhead.MemoryBytes >= bytes && a.overheadMeasured {
		return
	}
	a.overheadMeasured = true
	f := proto.Clone(a.hostFacts).(*v1.HostFacts)
	f.GuestOverhead.MemoryBytes = bytes
	a.hostFacts = f
	a.hub.setFacts(f)
}

func firstLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	s, _, _ := strings.Cut(string(b), "\n")
	return s
}

func memTotal() (int64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("the host's memory: %w", err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if rest, ok := strings.CutPrefix(sc.Text(), "MemTotal:"); ok {
			kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("the host's memory: %w", err)
			}
			return kb << 10, nil
		}
	}
	return 0, fmt.Errorf("the host's memory: no MemTotal in /proc/meminfo")
}
