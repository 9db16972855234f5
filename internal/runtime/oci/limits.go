package oci

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

const cpuPeriod = 100_000 // microseconds

func checkResources(id string, q *v1.Resources) error {
	bad := func(what string) error {
		return fmt.Errorf("container %s: %s: %w", id, what, errdefs.ErrInvalidArgument)
	}
	switch {
	case q == nil:
		return nil
	case q.CpuMilliLimit < 0 || q.CpuMilliLimit > 10_000_000 || q.CpuMilliLimit > 0 && q.CpuMilliLimit < 10:
		return bad("cpu limit must be between 10 thousandths and 10000 cores")
	case q.MemoryBytesLimit < 0 || q.MemoryBytesLimit > 0 && q.MemoryBytesLimit < 6<<20:
		return bad("memory limit must be at least 6 MiB")
	case q.MemoryBytesReservation < 0 || q.MemoryBytesLimit > 0 && q.MemoryBytesReservation > q.MemoryBytesLimit:
		return bad("memory reservation is above its limit")
	case q.CpuShares < 0 || q.CpuShares > 262144 || q.CpuMilliReservation < 0:
		return bad("cpu shares or reservation out of range")
	case q.PidsLimit < -1:
		return bad("pids limit must be -1 (none) or positive")
	case q.MemorySwapBytes < -1 || q.MemorySwapBytes > 0 && q.MemorySwapBytes < q.MemoryBytesLimit:
		return bad("memory+swap must be at least the memory limit")
	case strings.Trim(q.CpusetCpus, "0123456789,-") != "":
		return bad(fmt.Sprintf("cpuset %q", q.CpusetCpus))
	}
	return nil
}

// limits translates; absent limits are left out.
func (r *Runtime) limits(id string, q *v1.Resources) (*specs.LinuxCPU, *specs.LinuxMemory, *specs.LinuxPids) {
	cpu, mem := &specs.LinuxCPU{}, &specs.LinuxMemory{}
	if q == nil {
		return cpu, mem, nil
	}
	if q.CpuMilliLimit > 0 {
		quota, period := q.CpuMilliLimit*cpuPeriod/1000, uint64(cpuPeriod)
		cpu.Quota, cpu.Period = &quota, &period
	}
	shares := uint64(q.CpuShares)
	if shares == 0 { // what is guaranteed is also what counts under contention
		shares = uint64(q.CpuMilliReservation * 1024 / 1000)
	}
	if shares > 0 {
		shares = min(max(shares, 2), 262144)
		cpu.Shares = &shares
	}
	cpu.Cpus = q.CpusetCpus
	if q.MemoryBytesLimit > 0 {
		mem.Limit = &q.MemoryBytesLimit
		check := true
		mem.CheckBeforeUpdate = &check
	}
	if q.MemoryBytesReservation > 0 {
		mem.Reservation = &q.MemoryBytesReservation
	}
	if q.MemoryBytesLimit > 0 {
		swap := q.MemorySwapBytes
		if swap == 0 { // Docker's default: as much again
			swap = -1
			if q.MemoryBytesLimit <= math.MaxInt64/2 {
				swap = 2 * q.MemoryBytesLimit
			}
		}
		if r.cg.Group(r.cgroupPath(id)).SwapLimits() {
			mem.Swap = &swap
		} else if q.MemorySwapBytes != 0 {
			r.log.Warn("swap limit left out: this kernel does not count swap", "container", id)
		}
	}
	if q.PidsLimit != 0 {
		return cpu, mem, &specs.LinuxPids{Limit: &q.PidsLimit}
	}
	return cpu, mem, nil
}

// Update implements runtime.Runtime: q replaces all limits. A memory limit below
// what the container uses is refused rather than answered with an OOM kill.
func (r *Runtime) Update(ctx context.Context, id string, q *v1.Resources) error {
	if err := checkResources(id, q); err != nil {
		return err
	}
	c, err := r.hold(id)
	if err != nil {
		return err
	}
	defer c.op.Unlock()
	r.mu.Lock()
	running := c.running()
	r.mu.Unlock()
	if running {
		if err := r.updateRunning(ctx, id, q); err != nil {
			return err
		}
	}
	r.mu.Lock()
	spec := proto.CloneOf(c.spec)
	r.mu.Unlock()
	spec.Resources = proto.CloneOf(q)
	if err := r.saveSpec(spec); err != nil {
		return err
	}
	r.mu.Lock()
	c.spec, c.ready = spec, nil
	r.mu.Unlock()
	return nil
}

func (r *Runtime) updateRunning(ctx context.Context, id string, q *v1.Resources) error {
	var res specs.LinuxResources
	res.CPU, res.Memory, res.Pids = r.limits(id, q)
	// What is absent is to be unlimited now; runc leaves alone what it is not told.
	if res.CPU.Quota == nil {
		quota, period := int64(-1), uint64(cpuPeriod)
		res.CPU.Quota, res.CPU.Period = &quota, &period
	}
	if res.CPU.Shares == nil {
		shares := uint64(1024)
		res.CPU.Shares = &shares
	}
	none := int64(-1)
	if u := r.cg.Group(r.cgroupPath(id)).Usage(); q.GetMemoryBytesLimit() > 0 && u.MemoryBytes > q.MemoryBytesLimit {
		return fmt.Errorf("container %s uses %d bytes of memory, more than the new limit of %d: %w", id, u.MemoryBytes, q.MemoryBytesLimit, errdefs.ErrFailedPrecondition)
	}
	if res.Memory.Limit == nil {
		res.Memory.Limit = &none
		if r.cg.Group(r.cgroupPath(id)).SwapLimits() {
			res.Memory.Swap = &none
		}
	}
	if res.Pids == nil {
		res.Pids = &specs.LinuxPids{Limit: &none}
	}
	b, err := json.Marshal(&res)
	if err != nil {
		return fmt.Errorf("limits of container %s: %w", id, err)
	}
	file := filepath.Join(r.runDir(id), "update.json")
	if err := replaceFile(file, b, 0o600); err != nil {
		return fmt.Errorf("limits of container %s: %w", id, err)
	}
	defer os.Remove(file)
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, r.o.Runc, "--root", r.runcRoot(), "update", "--resources", file, id).CombinedOutput()
	if err != nil {
		return fmt.Errorf("limits of container %s: %s: %w: %w", id, strings.TrimSpace(string(out[:min(len(out), 1024)])), err, errdefs.ErrInvalidArgument)
	}
	return nil
}
