// Package guesttest gives tests the guest to boot: built from the working tree,
// once for all test processes of a user, kept under the user's cache directory
// by content.
//
//	m := guesttest.Image(t)
//	spec := hypervisor.MachineSpec{Kernel: m.Kernel, Initrd: m.Initrd, GuestVersion: m.Version}
package guesttest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tandem/internal/guestimage"
)

// result is what became of building with one main package.
type result struct {
	once  sync.Once
	built guestimage.Manifest
	err   error
}

var (
	mu      sync.Mutex
	results = map[string]*result{}
)

// Image builds tandem-guest, runc and the guest image, or finds them built. It
// fails the test if that cannot be done.
func Image(t testing.TB) guestimage.Manifest {
	t.Helper()
	return ImageOf(t, "./cmd/tandem-guest")
}

// ImageOf is Image with another main package in tandem-guest's place, given
// relative to the module's root: one that does more, for tests to look inside.
func ImageOf(t testing.TB, main string) guestimage.Manifest {
	t.Helper()
	mu.Lock()
	r := results[main]
	if r == nil {
		r = &result{}
		results[main] = r
	}
	mu.Unlock()
	r.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
		defer cancel()
		r.built, r.err = build(ctx, main, t.Logf)
	})
	if r.err != nil {
		t.Fatalf("guest image: %v", r.err)
	}
	return r.built
}

// Runc is the path of the static runc on this host that the guest has, too.
func Runc(t testing.TB) string {
	t.Helper()
	cache, err := cacheDir()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	unlock, err := lock(ctx, cache)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	path, err := runc(ctx, cache)
	if err != nil {
		t.Fatalf("runc: %v", err)
	}
	return path
}

func cacheDir() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(base, "tandem", "guesttest")
	return dir, os.MkdirAll(dir, 0o755)
}

func build(ctx context.Context, main string, logf func(string, ...any)) (guestimage.Manifest, error) {
	cache, err := cacheDir()
	if err != nil {
		return guestimage.Manifest{}, err
	}
	unlock, err := lock(ctx, cache)
	if err != nil {
		return guestimage.Manifest{}, err
	}
	defer unlock()
	began := time.Now()
	runcPath, err := runc(ctx, cache)
	if err != nil {
		return guestimage.Manifest{}, err
	}
	guest := filepath.Join(cache, filepath.Base(main))
	if err := gobuild(ctx, root(), guest, []string{"CGO_ENABLED=0"}, "-trimpath", "-ldflags", "-s -w", main); err != nil {
		return guestimage.Manifest{}, err
	}
	// The image is a function of these; building it takes longer than looking.
	key, err := keyOf(guest, runcPath, sources(filepath.Join(root(), "internal", "guestimage")))
	if err != nil {
		return guestimage.Manifest{}, err
	}
	out := filepath.Join(cache, "image-"+key)
	if m, err := guestimage.Load(out); err == nil {
		os.Chtimes(out, time.Now(), time.Now())
		return m, nil
	}
	m, err := guestimage.Build(ctx, guestimage.Options{GuestBinary: guest, RuncBinary: runcPath, CacheDir: cache, OutDir: out})
	if err != nil {
		return m, err
	}
	logf("guest image %s built in %v", m.Version, time.Since(began).Round(time.Millisecond))
	prune(cache, out)
	return m, nil
}

// root is the module's directory.
func root() string {
	dir, err := os.Getwd()
	for err == nil {
		if _, serr := os.Stat(filepath.Join(dir, "go.mod")); serr == nil {
			return dir
		}
		if dir == "/" {
			break
		}
		dir = filepath.Dir(dir)
	}
	return "."
}

func runc(ctx context.Context, cache string) (string, error) {
	dir := filepath.Join(root(), "build", "runc")
	key, err := keyOf(filepath.Join(dir, "go.mod"), filepath.Join(dir, "go.sum"))
	if err != nil {
		return "", err
	}
	path := filepath.Join(cache, "runc-"+key)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	return path, gobuild(ctx, dir, path, []string{"CGO_ENABLED=1"}, "-trimpath", "-tags", "seccomp netgo osusergo runc_nocriu",
		"-ldflags", "-s -w -extldflags -static", "github.com/opencontainers/runc")
}

// gobuild builds next to out and renames: out is whole or not there.
func gobuild(ctx context.Context, dir, out string, env []string, args ...string) error {
	tmp := fmt.Sprintf("%s.%d", out, os.Getpid())
	defer os.Remove(tmp)
	c := exec.CommandContext(ctx, "go", append([]string{"build", "-o", tmp}, args...)...)
	c.Dir = dir
	c.Env = append(os.Environ(), env...)
	if b, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("go build in %s: %w: %s", dir, err, bytes.TrimSpace(b))
	}
	return os.Rename(tmp, out)
}

func keyOf(files ...string) (string, error) {
	h := sha256.New()
	for _, f := range files {
		for _, one := range strings.Split(f, "\n") {
			b, err := os.ReadFile(one)
			if err != nil {
				return "", err
			}
			fmt.Fprintf(h, "%d\n", len(b))
			h.Write(b)
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

// sources lists a package's files, but for tests.
func sources(dir string) string {
	all, _ := filepath.Glob(filepath.Join(dir, "*.go"))
	var list []string
	for _, f := range all {
		if !strings.HasSuffix(f, "_test.go") {
			list = append(list, f)
		}
	}
	return strings.Join(list, "\n")
}

// lock keeps other test processes out meanwhile.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for another test's build in %s: %w", dir, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// prune removes images that no test has used for two hours.
func prune(cache, keep string) {
	old, _ := filepath.Glob(filepath.Join(cache, "image-*"))
	for _, dir := range old {
		st, err := os.Stat(dir)
		if dir != keep && err == nil && time.Since(st.ModTime()) > 2*time.Hour {
			os.RemoveAll(dir)
		}
	}
}
