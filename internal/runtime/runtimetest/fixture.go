// Package runtimetest is the suite that every implementation of package
// runtime's contract must pass, and what such tests need: a small root file
// system, the OCI runtime, specs.
//
//	func TestSuite(t *testing.T) {
//		tg := runtimetest.Target{RT: rt, Layer: "layer"} // a disk that is mounted already
//		runtimetest.Run(t, tg)   // what every implementation must do
//		runtimetest.Linux(t, tg) // and what those on a real kernel must do too
//	}
package runtimetest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"
)

// Limit bounds one step of a test; emulated and loaded machines are slow.
const Limit = 90 * time.Second

// Context ends with the test, or after Limit.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	t.Cleanup(cancel)
	return ctx
}

// Unique is a fresh container or disk id with a prefix.
func Unique(prefix string) string {
	var b [4]byte
	_, _ = rand.Read(b[:])
	return prefix + "-" + hex.EncodeToString(b[:])
}

// Eventually waits until fn is true, or fails the test.
func Eventually(t testing.TB, what string, fn func() bool) {
	t.Helper()
	for end := time.Now().Add(Limit); !fn(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("did not happen: %s", what)
		}
	}
}

// BusyboxImage writes an ext4 image with a busybox root file system: its
// applets, /etc/passwd (root, app = 1000), /etc/group (extra = 2000 with app),
// /data with content owned by app, /escape -> /../../etc.
func BusyboxImage(t testing.TB, path string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "tandem-busybox")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "var/log", "home/app", "data/sub"} {
		must(os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	must(os.Chmod(filepath.Join(dir, "tmp"), 0o777|os.ModeSticky))
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("busybox-static must be installed: %v", err)
	}
	b, err := os.ReadFile(busybox)
	must(err)
	must(os.WriteFile(filepath.Join(dir, "bin/busybox"), b, 0o755))
	out, err := exec.Command(busybox, "--list").Output()
	must(err)
	for _, a := range strings.Fields(string(out)) {
		if a != "busybox" {
			must(os.Symlink("busybox", filepath.Join(dir, "bin", a)))
		}
	}
	for name, text := range map[string]string{
		"etc/passwd":    "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:App:/home/app:/bin/sh\n",
		"etc/group":     "root:x:0:\napp:x:1000:\nextra:x:2000:app\n",
		"data/hello":    "from the image\n",
		"data/sub/deep": "deep\n",
		"run/kept":      "image content below /run\n",
	} {
		must(os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	must(os.Symlink("hello", filepath.Join(dir, "data/link")))
	must(os.Symlink("/../../etc", filepath.Join(dir, "escape")))
	for _, p := range []string{"data", "data/hello", "home/app"} {
		if err := os.Chown(filepath.Join(dir, p), 1000, 1000); err != nil {
			t.Fatalf("tests with real containers need root: %v", err)
		}
	}
	must(os.Chmod(filepath.Join(dir, "data"), 0o750))
	Ext4(t, path, 8<<20, dir)
}

// Ext4 makes an ext4 image of size bytes with the content of dir ("" = empty).
func Ext4(t testing.TB, path string, size int64, dir string) {
	t.Helper()
	args := []string{"-q", "-F", "-b", "4096", "-N", "2048"}
	if dir != "" {
		args = append(args, "-O", "^has_journal", "-d", dir)
	}
	args = append(args, path, fmt.Sprintf("%dk", size>>10))
	if out, err := exec.Command("mkfs.ext4", args...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4 (e2fsprogs must be installed): %v: %s", err, out)
	}
}

var runcOnce struct {
	sync.Once
	path string
	err  error
}

// Runc finds the OCI runtime: $TANDEM_RUNC, the one that make built (in
// $TANDEM_LIB_DIR or bin/), or one built from build/runc into the user's cache.
func Runc(t testing.TB) string {
	t.Helper()
	runcOnce.Do(func() { runcOnce.path, runcOnce.err = findRunc() })
	if runcOnce.err != nil {
		t.Fatal(runcOnce.err)
	}
	return runcOnce.path
}

func findRunc() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	built := filepath.Join(cache, "tandem-test", "runc")
	candidates := []string{os.Getenv("TANDEM_RUNC"), filepath.Join(os.Getenv("TANDEM_LIB_DIR"), "runc"), "", built}
	root, noTree := moduleRoot()
	if noTree == nil {
		candidates[2] = filepath.Join(root, "bin", "runc")
	}
	for _, p := range candidates {
		if !filepath.IsAbs(p) {
			continue
		}
		if out, err := exec.Command(p, "--version").Output(); err == nil && strings.HasPrefix(string(out), "runc version") {
			return p, nil
		}
	}
	if noTree != nil {
		return "", noTree
	}
	if err := os.MkdirAll(filepath.Dir(built), 0o755); err != nil {
		return "", err
	}
	tmp := fmt.Sprintf("%s.%d", built, os.Getpid())
	cmd := exec.Command("go", "build", "-trimpath", "-tags", "seccomp netgo osusergo runc_nocriu",
		"-ldflags", "-s -w -extldflags -static", "-o", tmp, "github.com/opencontainers/runc")
	cmd.Dir = filepath.Join(root, "build", "runc")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build runc (libseccomp-dev must be installed): %w: %s", err, out)
	}
	return built, os.Rename(tmp, built)
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "build", "runc", "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("build/runc was not found above the working directory")
}

// Spec is a container without a network that runs args on the given layer.
func Spec(layer string, args ...string) *v1.RuntimeSpec {
	return &v1.RuntimeSpec{
		Id: Unique("c"), Name: "test", Args: args, Layers: []string{layer},
		Network: &v1.RuntimeNetwork{Mode: "none"},
	}
}
