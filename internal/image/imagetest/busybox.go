package imagetest

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// Busybox returns a layer with a static busybox, all its applets as links, /etc
// with root and nobody, and the directories that programs expect.
func Busybox() (*Layer, error) {
	bin, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("busybox is missing; install busybox-static: %w", err)
	}
	if libs, err := libraries(bin); err != nil || len(libs) > 0 {
		return nil, fmt.Errorf("%s is not static; install busybox-static (%v)", bin, err)
	}
	out, err := exec.Command(bin, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox's applets: %w", err)
	}
	l := &Layer{}
	if err := l.HostAs(bin, "bin/busybox"); err != nil {
		return nil, err
	}
	for _, a := range strings.Fields(string(out)) {
		if a != "busybox" && !strings.Contains(a, "/") {
			l.Link("bin/"+a, "bin/busybox")
		}
	}
	for _, d := range []string{"dev", "proc", "sys", "run", "root", "home", "usr/bin", "var/log", "etc"} {
		l.Dir(d, 0o755)
	}
	l.Dir("tmp", 0o1777)
	l.File("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
	l.File("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n")
	return l, nil
}

// Path is the PATH of the images made here.
const Path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// BusyboxRef is the name of BusyboxImage.
const BusyboxRef = "busybox:test"

// BusyboxImage writes the archive of an image with all of busybox, named
// "busybox:test", and returns its path.
func BusyboxImage(t testing.TB) string {
	t.Helper()
	l, err := Busybox()
	if err != nil {
		t.Fatal(err)
	}
	return Archive(t, BusyboxRef, Config{Env: []string{Path}, Cmd: []string{"sh"}}, l)
}

// LddClosure writes the archive of a slim image: busybox, the host's files named
// (files, directories, symbolic links), and the shared libraries that the
// binaries among them need. Returns the archive's path.
func LddClosure(t testing.TB, ref string, c Config, files ...string) string {
	t.Helper()
	base, err := Busybox()
	if err != nil {
		t.Fatal(err)
	}
	l, err := Closure(files...)
	if err != nil {
		t.Fatalf("make image %s: %v", ref, err)
	}
	if len(c.Env) == 0 {
		c.Env = []string{Path}
	}
	return Archive(t, ref, c, base, l)
}

// Closure returns a layer with the host's files named and the shared libraries
// that the ELF binaries among them need, at the host's paths.
func Closure(files ...string) (*Layer, error) {
	l := &Layer{}
	for _, f := range files {
		if err := l.Host(f); err != nil {
			return nil, err
		}
	}
	for name, e := range l.entries {
		if e.from == "" {
			continue
		}
		libs, err := libraries(e.from)
		if err != nil {
			return nil, fmt.Errorf("libraries of %s: %w", name, err)
		}
		for _, lib := range libs {
			if l.has(lib) {
				continue
			}
			if err := l.Host(lib); err != nil {
				return nil, err
			}
		}
	}
	return l, nil
}

// libraries asks the dynamic loader which libraries a binary needs; none when it
// is static or no ELF file.
func libraries(name string) ([]string, error) {
	f, err := elf.Open(name)
	if err != nil {
		return nil, nil
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil || len(needed) == 0 {
		return nil, nil //nolint:nilerr // no dynamic section
	}
	out, err := exec.Command("ldd", name).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("ldd: %w: %s", err, bytes.TrimSpace(out))
	}
	var libs []string
	for _, line := range strings.Split(string(out), "\n") {
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "/") {
				libs = append(libs, word)
			}
		}
		if strings.Contains(line, "not found") {
			return nil, fmt.Errorf("ldd: %s", strings.TrimSpace(line))
		}
	}
	return libs, nil
}
