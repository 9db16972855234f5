package secopt

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

const good = `{
	"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
	"archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
	"syscalls": [
		{"names": ["read", "write"], "action": "SCMP_ACT_ALLOW", "args": null, "comment": "", "includes": {}, "excludes": {}},
		{"name": "ptrace", "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8", "caps": ["CAP_SYS_PTRACE"]}},
		{"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}]}
	]
}`

func TestCheck(t *testing.T) {
	for _, o := range []string{"no-new-privileges", "no-new-privileges:true", "no-new-privileges=false", "seccomp=unconfined", "seccomp:unconfined", "seccomp=builtin",
		"systempaths=unconfined", "apparmor=unconfined", "label=disable", "seccomp=" + good} {
		if err := Check(o); err != nil {
			t.Errorf("%s: %v", o, err)
		}
	}
	allow := func(rest string) string { return `seccomp={"defaultAction":"SCMP_ACT_ALLOW"` + rest + `}` }
	for o, want := range map[string]string{
		"": "not known", "colour=blue": "not known", "no-new-privileges=maybe": "not known", "systempaths=all": "not known",
		"seccomp=profile.json": "text of the profile is wanted", "apparmor=mine": "not supported", "label=user:x": "not supported",
		"seccomp={}":                                  "defaultAction is missing",
		"seccomp={":                                   "Docker's format",
		`seccomp={"defaultAction":1}`:                 "Docker's format",
		`seccomp={"defaultAction":"ALLOW"}`:           `"ALLOW" is not one of`,
		`seccomp={"defaultAction":"SCMP_ACT_NOTIFY"}`: "is not one of",
		allow(`,"listenerPath":"/run/x"`):             "listeners are not supported",
		allow(`,"LISTENERPATH":"/run/x"`):             "listeners are not supported",
		allow(`,"architectures":["a"],"archMap":[{"architecture":"b"}]`):                                         "one of both",
		allow(`,"architectures":["` + strings.Repeat(`a","`, 101) + `"]`):                                        "102 architectures",
		allow(`,"syscalls":[null]`):                                                                              "syscalls[0]: names are missing",
		allow(`,"syscalls":[{"nmaes":["mkdir"],"action":"SCMP_ACT_ERRNO"}]`):                                     "names are missing",
		allow(`,"syscalls":[{"names":[""],"action":"SCMP_ACT_ERRNO"}]`):                                          "a name is empty",
		allow(`,"syscalls":[{"name":"a","names":["b"],"action":"SCMP_ACT_ERRNO"}]`):                              "one of both",
		allow(`,"syscalls":[{"names":["a"]}]`):                                                                   "action",
		allow(`,"syscalls":[{"names":["a"],"action":"SCMP_ACT_NOTIFY"}]`):                                        "is not one of",
		allow(`,"syscalls":[{"names":["a"],"action":"SCMP_ACT_ERRNO","args":[null]}]`):                           "op",
		allow(`,"syscalls":[{"names":["a"],"action":"SCMP_ACT_ERRNO","args":[{"index":6,"op":"SCMP_CMP_EQ"}]}]`): "index 6",
		allow(`,"syscalls":[{"names":["a"],"action":"SCMP_ACT_ERRNO","args":[{"index":-1}]}]`):                   "Docker's format",
		allow(`,"syscalls":[{"names":["a"],"action":"SCMP_ACT_ERRNO","excludes":{"minKernel":"new"}}]`):          "minKernel",
		allow(`,"syscalls":[{"names":["` + strings.Repeat(`a","`, 10_000) + `a"],"action":"SCMP_ACT_ERRNO"}]`):   "more than 10000 system calls",
		allow(`,"x":"` + strings.Repeat("a", MaxProfile) + `"`):                                                  "more than 1048576 bytes",
	} {
		if err := Check(o); err == nil || !strings.Contains(err.Error(), want) || len(err.Error()) > 400 {
			t.Errorf("%.120s: %v; want %q", o, err, want)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	resolve := func(p string) (string, error) { return filepath.Join(dir, p), nil }
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("good.json", good)
	write("long.json", strings.Repeat(" ", MaxProfile)+"{}")
	write("bad.json", `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{}]}`)
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, o := range []string{"seccomp=good.json", "seccomp:good.json"} {
		got, err := Load(o, resolve)
		if err != nil || !strings.HasPrefix(got, `seccomp={"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,"archMap":[{`) || Check(got) != nil {
			t.Error(got, err)
		}
	}
	for _, o := range []string{"seccomp=unconfined", "seccomp:unconfined", "seccomp=builtin", "no-new-privileges", "label=disable", "seccomp", `seccomp={"x":"good.json"}`} {
		if got, err := Load(o, resolve); err != nil || got != o {
			t.Error(o, got, err)
		}
	}
	for name, want := range map[string]string{"nobody.json": "no such file", "fifo": "not a regular file", ".": "not a regular file", "long.json": "more than", "bad.json": "syscalls[0]: names are missing"} {
		if _, err := Load("seccomp="+name, resolve); err == nil || !strings.Contains(fmt.Sprint(err), "seccomp profile "+name+": ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
