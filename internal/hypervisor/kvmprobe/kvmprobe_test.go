package kvmprobe

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"
)

func TestMain(m *testing.M) {
	MaybeChild()
	os.Exit(m.Run())
}

// The kernel reads these through a pointer: a wrong size is memory corruption.
func TestLayout(t *testing.T) {
	for name, c := range map[string][2]uintptr{
		"segment": {unsafe.Sizeof(segment{}), 24},
		"table":   {unsafe.Sizeof(table{}), 16},
		"sregs":   {unsafe.Sizeof(sregs{}), kvmSetSregs >> 16 & 0x3fff},
		"regs":    {unsafe.Sizeof(regs{}), kvmSetRegs >> 16 & 0x3fff},
		"region":  {unsafe.Sizeof(memoryRegion{}), kvmSetUserMemory >> 16 & 0x3fff},
	} {
		if c[0] != c[1] {
			t.Errorf("%s has %d bytes, want %d", name, c[0], c[1])
		}
	}
}

func TestProbe(t *testing.T) {
	cache := filepath.Join(t.TempDir(), "state", "kvm.json")
	start := time.Now()
	v := Probe(context.Background(), cache)
	t.Logf("usable %v, stage %q, %v: %s", v.Usable, v.Stage, time.Since(start), v.Reason)
	if v.Reason == "" || v.Cached {
		t.Fatalf("verdict without a reason, or from nowhere: %+v", v)
	}
	if v.Usable && v.Stage != "all of it" {
		t.Errorf("usable at stage %q", v.Stage)
	}
	again := Probe(context.Background(), cache)
	if again.Usable != v.Usable || again.Reason != v.Reason {
		t.Errorf("second verdict differs: %+v, %+v", v, again)
	}
	if _, err := os.Stat(device); err == nil && !again.Cached {
		t.Error("second verdict did not come from the cache")
	}
}

func TestCacheIsOfThisBoot(t *testing.T) {
	boot, kernel := identity()
	if boot == "" || kernel == "" {
		t.Fatalf("no identity: %q %q", boot, kernel)
	}
	good := record{boot, kernel, revision, Verdict{Usable: true, Reason: "x"}}
	for name, change := range map[string]func(*record){
		"boot":     func(r *record) { r.BootID = "other" },
		"kernel":   func(r *record) { r.Kernel = "other" },
		"revision": func(r *record) { r.Revision++ },
		"empty":    func(r *record) { r.Verdict.Reason = "" },
	} {
		file := filepath.Join(t.TempDir(), "kvm.json")
		store(file, good)
		if v, ok := load(file, boot, kernel); !ok || !v.Usable || !v.Cached {
			t.Fatalf("good record not believed: %+v", v)
		}
		r := good
		change(&r)
		b, _ := json.Marshal(r)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, ok := load(file, boot, kernel); ok {
			t.Errorf("%s: believed", name)
		}
	}
	file := filepath.Join(t.TempDir(), "kvm.json")
	_ = os.WriteFile(file, []byte("{"), 0o600)
	if _, ok := load(file, boot, kernel); ok {
		t.Error("a broken file was believed")
	}
}
