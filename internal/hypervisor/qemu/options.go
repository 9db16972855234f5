package qemu

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/kvmprobe"
)

// Options say where and how a driver runs machines. Only StateDir and RunDir
// must be given.
type Options struct {
	StateDir string // survives a reboot
	RunDir   string // need not survive one; sockets

	// Accel is "auto" (also ""), "kvm" (also where it is very slow) or "tcg". auto
	// takes KVM where it was proved to work, and TCG, QEMU's translator, elsewhere.
	Accel string
	// User is whom QEMU runs as. The default gives every machine a uid of its
	// own from UserRange, so that a guest that broke out can't touch another's VMM.
	User *User
	// UserRange is where those uids, and the group of all of them, come from.
	UserRange UserRange
	// Binary of QEMU; the default is looked up in PATH.
	Binary string
	// CgroupParent is the group below which machines' groups are made; the
	// default is derived from StateDir.
	CgroupParent string
	// TranslationCache is the size in bytes of TCG's cache of translated code;
	// 0 means 112 MiB. It fills as the guest runs more code. A machine that may
	// have many CPUs gets at least 16 MiB for each.
	TranslationCache int64
	// ConsoleLog bounds the console log in bytes; 0 means 4 MiB.
	ConsoleLog int64
	Logger     *slog.Logger
}

// User is a numeric user and group.
type User struct{ UID, GID uint32 }

// UserRange is a range of ids that nobody else uses. Zero means
// 1,900,000,000 + 1,000,000, which systemd and Debian leave free.
type UserRange struct{ First, Count uint32 }

const (
	mib = int64(1) << 20
	// Base is what every machine starts with.
	baseCPUs   = 1
	baseMemory = 256 * mib
	// memoryStep is virtio-mem's block: what a Linux guest can add or take away.
	memoryStep = 4 * mib
	maxCPUs    = 32
	maxDisks   = 1024
	maxNICs    = 4
	// vmmMemory is what QEMU itself may use, besides the translation cache.
	vmmMemory = 100 * mib
)

// host is what New found out about this host.
type host struct {
	accel     string
	verdict   kvmprobe.Verdict
	version   string // of QEMU, with the package's
	boot      string
	kernel    string
	max       hypervisor.Size
	who       identity
	rangeFrom uint32 // first uid for machines; 0: all run as who
	rangeLen  uint32
	tag       string // of this driver, in command lines and the cgroup's name
}

func (o *Options) fill() error {
	if o.StateDir == "" || o.RunDir == "" {
		return fmt.Errorf("qemu driver: StateDir and RunDir must be given: %w", errdefs.ErrInvalidArgument)
	}
	var err error
	if o.StateDir, err = filepath.Abs(o.StateDir); err == nil {
		o.RunDir, err = filepath.Abs(o.RunDir)
	}
	if err != nil {
		return fmt.Errorf("qemu driver: %w", err)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Accel == "" {
		o.Accel = "auto"
	}
	if o.TranslationCache == 0 {
		o.TranslationCache = tcgCache
	}
	if o.ConsoleLog == 0 {
		o.ConsoleLog = 4 * mib
	}
	if o.UserRange == (UserRange{}) {
		o.UserRange = UserRange{1_900_000_000, 1_000_000}
	}
	if o.Binary == "" {
		o.Binary = "qemu-system-x86_64"
	}
	if o.Binary, err = exec.LookPath(o.Binary); err != nil {
		return fmt.Errorf("QEMU is not installed (apt-get install qemu-system-x86): %w: %v", errdefs.ErrFailedPrecondition, err)
	}
	return nil
}

// inspect finds out what the driver has to work with.
func (o *Options) inspect(ctx context.Context) (host, error) {
	h := host{}
	sum := sha256.Sum256([]byte(o.StateDir))
	h.tag = "tandem-" + hex.EncodeToString(sum[:5])
	if o.CgroupParent == "" {
		o.CgroupParent = filepath.Join("tandem", strings.TrimPrefix(h.tag, "tandem-"))
	}
	o.CgroupParent = strings.Trim(filepath.Clean("/"+o.CgroupParent), "/")
	if o.CgroupParent == "" {
		return h, fmt.Errorf("qemu driver: the root can't be the machines' cgroup: %w", errdefs.ErrInvalidArgument)
	}
	var err error
	if h.boot, err = bootID(); err != nil {
		return h, err
	}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		h.kernel = strings.TrimSpace(string(b))
	}
	if h.version, err = binaryVersion(ctx, o.Binary); err != nil {
		return h, err
	}
	if err := h.chooseAccel(ctx, o); err != nil {
		return h, err
	}
	h.chooseUser(o, sum[:])
	h.max.CPUs = max(2, min(runtime.NumCPU(), maxCPUs))
	total, err := hostMemory()
	if err != nil {
		return h, err
	}
	h.max.Memory = max(total/memoryStep*memoryStep, baseMemory+memoryStep)
	return h, nil
}

func (h *host) chooseAccel(ctx context.Context, o *Options) error {
	h.accel = "tcg"
	if o.Accel == "tcg" {
		return nil
	}
	if o.Accel != "auto" && o.Accel != "kvm" {
		return fmt.Errorf("accelerator %q: must be auto, kvm or tcg: %w", o.Accel, errdefs.ErrInvalidArgument)
	}
	h.verdict = kvmprobe.Probe(ctx, filepath.Join(o.StateDir, "kvm.json"))
	if o.Accel == "kvm" && h.verdict.Present && !h.verdict.Usable {
		h.verdict = kvmprobe.ProbePatiently(ctx)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if h.verdict.Usable {
		if gid, ok := kvmGroup(); ok || os.Geteuid() != 0 {
			h.accel = "kvm"
			if ok {
				h.who.groups = []uint32{gid}
			}
			return nil
		}
		h.verdict.Usable = false
		h.verdict.Reason = "KVM works, but /dev/kvm is for root alone and QEMU does not run as root: chgrp kvm /dev/kvm && chmod 660 /dev/kvm"
	}
	if o.Accel == "kvm" {
		return fmt.Errorf("accelerator kvm: %s (use auto or tcg): %w", h.verdict.Reason, errdefs.ErrFailedPrecondition)
	}
	o.Logger.Warn("KVM is not usable: machines run translated (TCG), several times slower; tandem doctor explains", "reason", h.verdict.Reason)
	return nil
}

// kvmGroup is the group that may use /dev/kvm.
func kvmGroup() (uint32, bool) {
	fi, err := os.Stat("/dev/kvm")
	if err != nil {
		return 0, false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return st.Gid, ok && (fi.Mode().Perm()&0o060 == 0o060 || fi.Mode().Perm()&0o006 == 0o006)
}

func (h *host) chooseUser(o *Options, sum []byte) {
	switch {
	case os.Geteuid() != 0:
		h.who.keep = true
		h.who.uid, h.who.gid = uint32(os.Geteuid()), uint32(os.Getegid())
	case o.User != nil:
		h.who.uid, h.who.gid = o.User.UID, o.User.GID
	case mapped("/proc/self/uid_map", o.UserRange) && mapped("/proc/self/gid_map", o.UserRange):
		// Several drivers on one host start at different places of the range.
		slot := (uint32(sum[5])<<8 | uint32(sum[6])) % max(1, o.UserRange.Count/4096)
		h.who.gid = o.UserRange.First + slot*4096
		h.rangeFrom, h.rangeLen = h.who.gid+1, min(4095, o.UserRange.Count-1)
	default: // a user namespace without those ids
		h.who.uid, h.who.gid = 65534, 65534
	}
}

// mapped says whether a user namespace has all ids of a range.
func mapped(file string, r UserRange) bool {
	b, err := os.ReadFile(file)
	if err != nil {
		return true // no user namespaces in this kernel
	}
	for s := bufio.NewScanner(strings.NewReader(string(b))); s.Scan(); {
		var in, out, n uint64
		if _, err := fmt.Sscan(s.Text(), &in, &out, &n); err == nil &&
			uint64(r.First) >= in && uint64(r.First)+uint64(r.Count) <= in+n {
			return true
		}
	}
	return false
}

var versionLine = regexp.MustCompile(`version (\d+)\.(\d+)\.(\d+)[^\n]*`)

// binaryVersion asks the binary; templates and migration depend on it.
func binaryVersion(ctx context.Context, binary string) (string, error) {
	out, err := exec.CommandContext(ctx, binary, "-version").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s -version: %w: %s", binary, err, firstLine(string(out)))
	}
	m := versionLine.FindStringSubmatch(string(out))
	if m == nil {
		return "", fmt.Errorf("%s -version says %q: not QEMU", binary, firstLine(string(out)))
	}
	if major, _ := strconv.Atoi(m[1]); major < 7 {
		return "", fmt.Errorf("%s is version %s.%s; 7.2 or newer is needed: %w", binary, m[1], m[2], errdefs.ErrFailedPrecondition)
	}
	return strings.TrimPrefix(m[0], "version "), nil
}

func hostMemory() (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	var kib int64
	if _, err := fmt.Sscanf(string(b), "MemTotal: %d kB", &kib); err != nil {
		return 0, fmt.Errorf("/proc/meminfo: %w", err)
	}
	return kib << 10, nil
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(strings.TrimSpace(s), "\n")
	return s
}
