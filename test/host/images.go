package host

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Images makes small images of real programs from this computer's packages and
// loads them: busybox, and Apache httpd as what ldd says it needs.
func (h *Host) Images() {
	h.t.Helper()
	h.ImportTree("busybox:latest", func(root string) {
		BusyboxTree(h.t, root)
	}, "CMD [\"sh\"]", "ENV PATH=/bin")
	h.ImportTree("httpd:latest", func(root string) {
		BusyboxTree(h.t, root)
		ApacheTree(h.t, root)
	}, `CMD ["/usr/sbin/apache2", "-DFOREGROUND", "-f", "/etc/httpd.conf"]`, "EXPOSE 80", "ENV PATH=/bin:/usr/sbin")
}

// ImportTree makes an image of a tree that fill makes.
func (h *Host) ImportTree(ref string, fill func(root string), changes ...string) {
	h.t.Helper()
	root := h.t.TempDir()
	fill(root)
	tarball := filepath.Join(h.t.TempDir(), "root.tar")
	run(h.t, "tar", "-C", root, "--owner=0", "--group=0", "--numeric-owner", "-cf", tarball, ".")
	args := []string{"image", "import", tarball, ref}
	for _, c := range changes {
		args = append(args, "-c", c)
	}
	h.Tandem(args...)
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// BusyboxTree is busybox with all its applets.
func BusyboxTree(t testing.TB, root string) {
	t.Helper()
	for _, d := range []string{"bin", "etc", "tmp", "var/www", "root", "data"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	bb, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("%v: run make deps", err)
	}
	run(t, "cp", bb, filepath.Join(root, "bin/busybox"))
	run(t, filepath.Join(root, "bin/busybox"), "--install", "-s", filepath.Join(root, "bin"))
	// --install makes links to the path it was called by; they must point inside.
	links, _ := filepath.Glob(filepath.Join(root, "bin/*"))
	for _, l := range links {
		if filepath.Base(l) == "busybox" {
			continue
		}
		os.Remove(l)
		if err := os.Symlink("busybox", l); err != nil {
			t.Fatal(err)
		}
	}
	Write(t, root, "etc/passwd", "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www:/var/www:/bin/sh\n")
	Write(t, root, "etc/group", "root:x:0:\nwww-data:x:33:\n")
}

// Write puts a file into a tree.
func Write(t testing.TB, root, name, text string) {
	t.Helper()
	f := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// ApacheTree copies the computer's Apache httpd (package apache2-bin), the
// modules that a reverse proxy needs, and the shared libraries of both.
func ApacheTree(t testing.TB, root string) {
	t.Helper()
	mods := "/usr/lib/apache2/modules"
	files := []string{"/usr/sbin/apache2"}
	conf := "ServerName localhost\nListen 80\nPidFile /tmp/httpd.pid\nErrorLog /dev/stderr\nDocumentRoot /var/www\nUser www-data\nGroup www-data\n"
	for _, m := range []string{"mpm_event", "authz_core", "dir", "proxy", "proxy_http"} {
		files = append(files, mods+"/mod_"+m+".so")
		conf += "LoadModule " + m + "_module " + mods + "/mod_" + m + ".so\n"
	}
	conf += "<Directory /var/www>\nRequire all granted\n</Directory>\nStartServers 1\nThreadsPerChild 8\nThreadLimit 8\nMaxRequestWorkers 16\nMinSpareThreads 4\nMaxSpareThreads 16\nIncludeOptional /etc/httpd.d/*.conf\n"
	Write(t, root, "etc/httpd.conf", conf)
	Write(t, root, "var/www/index.html", "It works: Apache httpd\n")
	seen := map[string]bool{}
	put := func(f string) {
		if seen[f] {
			return
		}
		seen[f] = true
		dst := filepath.Join(root, f)
		if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
			t.Fatal(err)
		}
		run(t, "cp", "-L", f, dst)
	}
	// Loaded by name when a thread ends, so that ldd does not tell of it.
	files = append(files, libgcc(t))
	for _, f := range files {
		put(f)
		for _, w := range strings.Fields(run(t, "ldd", f)) {
			if strings.HasPrefix(w, "/") {
				put(w)
			}
		}
	}
}

// libgcc is the path of the library that ends threads.
func libgcc(t testing.TB) string {
	t.Helper()
	for _, l := range strings.Split(run(t, "/sbin/ldconfig", "-p"), "\n") {
		if name, path, ok := strings.Cut(strings.TrimSpace(l), " => "); ok && strings.HasPrefix(name, "libgcc_s.so.1 ") {
			return path
		}
	}
	t.Fatal("no libgcc_s.so.1 on this computer")
	return ""
}
