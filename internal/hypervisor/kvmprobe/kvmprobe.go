// Package kvmprobe tells whether KVM can really run a 64-bit guest here.
//
// That /dev/kvm opens, and even that a virtual machine can be made, says little:
// under some nested hypervisors guest code then runs thousands of times too
// slowly. Only running a piece of 64-bit guest code tells. The probe does so with
// plain ioctls, in a child process that may use one second of CPU time, and keeps
// the verdict in a file until the next boot.
//
// The child is this same program, so that nothing else need be installed. main
// (and TestMain) must therefore begin with
//
//	kvmprobe.MaybeChild()
//
// which returns at once in any process but that child.
package kvmprobe

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"tandem/internal/files"
)

const (
	device    = "/dev/kvm"
	childName = "tandem-kvmprobe"
	// Budget is the CPU time in seconds that the payload may take. A usable KVM
	// needs about 0.02.
	budget = 1
	// patience is that of somebody who wants KVM even when it is slow.
	patience = 20
	// wall is how long the child may take by the clock, on a very loaded host.
	wall = 30 * time.Second
	// revision of the payload: verdicts of another one are not believed.
	revision = 1
)

// Verdict is what the probe found.
type Verdict struct {
	Usable  bool      `json:"usable"`
	Present bool      `json:"present"` // /dev/kvm exists
	Reason  string    `json:"reason"`  // for people; never empty
	Stage   string    `json:"stage,omitempty"`
	Checked time.Time `json:"checked"`
	Cached  bool      `json:"-"` // from the file, not run now
}

type record struct {
	BootID   string  `json:"boot_id"`
	Kernel   string  `json:"kernel"`
	Revision int     `json:"revision"`
	Verdict  Verdict `json:"verdict"`
}

// stages names what each byte of the payload's progress means.
var stages = map[byte]string{
	'a': "64-bit mode entered", 'b': "arithmetic", 'c': "memory copies",
	'd': "byte-wise copies", 'e': "exceptions", 'f': "address space switches",
	'g': "page faults", 'h': "privileged instructions", 'z': "all of it",
}

var hooked atomic.Bool

// MaybeChild runs the probe and exits if this process was started for it.
func MaybeChild() {
	hooked.Store(true)
	if len(os.Args) == 2 && os.Args[0] == childName {
		seconds, err := strconv.ParseUint(os.Args[1], 10, 8)
		if err != nil {
			fmt.Fprintln(os.Stderr, "seconds of CPU time:", err)
			os.Exit(1)
		}
		childMain(seconds)
	}
}

// Probe says whether KVM is usable. The verdict is read from cacheFile when it
// was found under this boot of this kernel; otherwise the payload is run and the
// verdict written there. An empty cacheFile means no cache. A cache that can't
// be read or written is as good as none.
func Probe(ctx context.Context, cacheFile string) Verdict { return probe(ctx, cacheFile, budget) }

// ProbePatiently also calls a KVM usable that is many times slower than it should be,
// as where the processor itself is translated. Nobody else is to believe that, so it
// keeps no verdict. It takes 20 s of CPU time at most.
func ProbePatiently(ctx context.Context) Verdict { return probe(ctx, "", patience) }

func probe(ctx context.Context, cacheFile string, budget uint64) Verdict {
	now := time.Now()
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Verdict{Checked: now, Reason: device + " does not exist: no hardware virtualization here, or it is off in the firmware, or the kvm module is not loaded"}
	case err != nil:
		return Verdict{Present: true, Checked: now, Reason: fmt.Sprintf("%s can't be opened: %v", device, err)}
	}
	_ = f.Close()
	if !hooked.Load() {
		return Verdict{Present: true, Checked: now, Reason: "not probed: main does not call kvmprobe.MaybeChild"}
	}
	boot, kernel := identity()
	if v, ok := load(cacheFile, boot, kernel); ok {
		return v
	}
	v, conclusive := run(ctx, budget)
	v.Present, v.Checked = true, now
	if conclusive {
		store(cacheFile, record{boot, kernel, revision, v})
	}
	return v
}

// run starts the child; conclusive is false when nothing about KVM was learnt.
func run(ctx context.Context, budget uint64) (v Verdict, conclusive bool) {
	ctx, cancel := context.WithTimeout(ctx, wall)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{childName, strconv.FormatUint(budget, 10)}
	cmd.Env = []string{"GOMAXPROCS=1", "GOTRACEBACK=none"}
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return Verdict{Reason: "probe: " + err.Error()}, false
	}
	if err := cmd.Start(); err != nil {
		return Verdict{Reason: "start the probe: " + err.Error()}, false
	}
	var last byte
	for r := bufio.NewReader(out); ; {
		b, err := r.ReadByte()
		if err != nil {
			break
		}
		last = b
	}
	err = cmd.Wait()
	if name := stages[last]; name != "" {
		v.Stage = name
	}
	if last == 'z' {
		v.Usable, v.Reason = true, "64-bit guest code runs at full speed"
		return v, true
	}
	if ctx.Err() != nil {
		v.Reason = fmt.Sprintf("the probe did not end in time: %v", ctx.Err())
		return v, errors.Is(ctx.Err(), context.DeadlineExceeded)
	}
	after := "before any guest code ran"
	if v.Stage != "" {
		after = "after stage: " + v.Stage
	}
	msg, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n")
	if msg == "" && err != nil && strings.Contains(err.Error(), "killed") {
		msg = fmt.Sprintf("guest code did not finish in %d s of CPU time", budget)
	} else if msg == "" && err != nil {
		msg = err.Error()
	}
	v.Reason = fmt.Sprintf("%s opens, but does not run a 64-bit guest: %s (%s)", device, msg, after)
	return v, true
}

func identity() (boot, kernel string) {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		kernel = unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Version[:])
	}
	return strings.TrimSpace(string(b)), kernel
}

func load(file, boot, kernel string) (Verdict, bool) {
	if file == "" || boot == "" {
		return Verdict{}, false
	}
	b, err := os.ReadFile(file)
	if err != nil || len(b) > 64<<10 {
		return Verdict{}, false
	}
	var r record
	if json.Unmarshal(b, &r) != nil || r.BootID != boot || r.Kernel != kernel || r.Revision != revision || r.Verdict.Reason == "" {
		return Verdict{}, false
	}
	r.Verdict.Cached = true
	return r.Verdict, true
}

func store(file string, r record) {
	if file == "" || r.BootID == "" {
		return
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return
	}
	if os.MkdirAll(filepath.Dir(file), 0o700) != nil {
		return
	}
	_ = files.Replace(file, append(b, '\n'), 0o600) // the next probe measures again
}
