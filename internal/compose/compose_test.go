package compose_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"

	"tandem/internal/compose"
)

var update = flag.Bool("update", false, "write the golden files")

var testEnv = []string{"TAG=1.2", "TOKEN=t0ken", "HOME=/nonexistent"}

// Every folder of testdata/ok holds Compose files and what becomes of them.
func TestGolden(t *testing.T) {
	dirs, err := filepath.Glob("testdata/ok/*")
	if err != nil || len(dirs) == 0 {
		t.Fatal("no test cases", err)
	}
	for _, dir := range dirs {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			o := compose.Options{WorkingDir: dir, Env: testEnv}
			if b, err := os.ReadFile(filepath.Join(dir, "profiles")); err == nil {
				o.Profiles = strings.Fields(string(b))
			}
			p, err := compose.Load(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			compare(t, filepath.Join(dir, "request.json"), dump(t, p))
		})
	}
}

// Every file of testdata/bad is refused, with all of its problems.
func TestRefused(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no test cases", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			_, err := compose.Load(t.Context(), compose.Options{Files: []string{file}, Env: testEnv})
			if err == nil {
				t.Fatal("taken without an error")
			}
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("class of %v", err)
			}
			wd, _ := os.Getwd()
			compare(t, strings.TrimSuffix(file, ".yaml")+".txt", []byte(strings.ReplaceAll(err.Error(), wd, "DIR")+"\n"))
		})
	}
}

func dump(t *testing.T, p *compose.Project) []byte {
	t.Helper()
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(p.Request)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	// protojson varies its spaces on purpose.
	if err := json.Indent(&out, raw, "", "  "); err != nil {
		t.Fatal(err)
	}
	for _, w := range p.Warnings {
		out.WriteString("\n// " + w)
	}
	out.WriteByte('\n')
	return []byte(strings.ReplaceAll(out.String(), wd, "DIR"))
}

func compare(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got; -update accepts):\n%s", file, d)
	}
}

func TestNothingToRead(t *testing.T) {
	_, err := compose.Load(t.Context(), compose.Options{WorkingDir: t.TempDir()})
	if !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("got %v, want not found", err)
	}
	_, err = compose.Load(t.Context(), compose.Options{Files: []string{"/nonexistent/compose.yaml"}})
	if !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("got %v, want not found", err)
	}
}

func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDiscoveryAndName(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "My.Shop")
	if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, dir, map[string]string{
		"docker-compose.yml":    "services: {a: {image: 'x:${V:-none}'}}",
		"compose.yaml":          "services: {a: {image: 'y:${V:-none}'}}",
		"compose.override.yaml": "services: {a: {hostname: over}}",
		".env":                  "V=dotenv\n",
		"other.env":             "V=other\n",
		"named.yaml":            "name: named\nservices: {a: {image: z}}",
	})
	load := func(o compose.Options) *compose.Project {
		t.Helper()
		p, err := compose.Load(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	check := func(p *compose.Project, name, image, host string) {
		t.Helper()
		s := p.Request.Services[0].Template
		if p.Request.Project != name || s.Image != image || s.Hostname != host {
			t.Errorf("got %s %s %s, want %s %s %s", p.Request.Project, s.Image, s.Hostname, name, image, host)
		}
	}
	check(load(compose.Options{WorkingDir: dir}), "myshop", "y:dotenv", "over")
	check(load(compose.Options{WorkingDir: filepath.Join(dir, "sub")}), "sub", "y:none", "over")
	check(load(compose.Options{WorkingDir: dir, Env: []string{"V=env", "COMPOSE_PROJECT_NAME=fromenv"}}), "fromenv", "y:env", "over")
	check(load(compose.Options{WorkingDir: dir, EnvFiles: []string{filepath.Join(dir, "other.env")}, ProjectName: "mine"}), "mine", "y:other", "over")
	check(load(compose.Options{Files: []string{filepath.Join(dir, "named.yaml")}}), "named", "z", "")
	check(load(compose.Options{Files: []string{filepath.Join(dir, "named.yaml")}, Env: []string{"COMPOSE_PROJECT_NAME=e"}}), "e", "z", "")
	check(load(compose.Options{Env: []string{"COMPOSE_FILE=" + filepath.Join(dir, "docker-compose.yml")}}), "myshop", "x:dotenv", "")
	if _, err := compose.Load(t.Context(), compose.Options{WorkingDir: dir, ProjectName: "Not Valid"}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("bad name: %v", err)
	}
}

func TestBuildWithImage(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"compose.yaml": "services: {a: {image: x, build: .}}"})
	if _, err := compose.Load(t.Context(), compose.Options{WorkingDir: dir}); err == nil || !strings.Contains(err.Error(), "services.a.build: build contexts are not supported yet") {
		t.Errorf("got %v", err)
	}
	p, err := compose.Load(t.Context(), compose.Options{WorkingDir: dir, IgnoreBuild: true})
	if err != nil || len(p.Warnings) != 1 {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestHostileFiles(t *testing.T) {
	bomb := "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c <= 'k'; c++ {
		bomb += string(c) + ": &" + string(c) + " [" + strings.Repeat("*"+string(c-1)+",", 9) + "*" + string(c-1) + "]\n"
	}
	for name, text := range map[string]string{
		"bomb":   "services: {s: {image: x}}\nx-y:\n  " + strings.ReplaceAll(strings.TrimSpace(bomb), "\n", "\n  "),
		"huge":   "services: {s: {image: x}}\n#" + strings.Repeat("x", compose.MaxFile),
		"deep":   "services: " + strings.Repeat("[", 20000),
		"empty":  "",
		"scalar": "hello",
		"binary": "\x00\x01\xff",
		"cycle":  "services: {s: &s {image: x, labels: *s}}",
		"loop":   "services: {a: {image: x, depends_on: [b]}, b: {image: x, depends_on: [a]}}",
		"zero":   "services: {a: {image: x, env_file: [/dev/zero]}}",
		"label":  "services: {a: {image: x, label_file: /dev/zero}}",
		"base":   "services: {a: {extends: {file: /dev/zero, service: x}}}",
		"inc":    "include: [/dev/zero]\nservices: {a: {image: x}}",
		"secret": "services: {a: {image: x, secrets: [s]}}\nsecrets: {s: {file: /dev/zero}}",
		"self":   "include: [compose.yaml]\nservices: {a: {image: x}}",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, map[string]string{"compose.yaml": text})
			if _, err := compose.Load(t.Context(), compose.Options{WorkingDir: dir}); !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("got %v, want an invalid argument", err)
			} else if len(err.Error()) > 4096 {
				t.Errorf("message of %d bytes", len(err.Error()))
			}
		})
	}
}
