package compose_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"tandem/internal/compose"
)

// FuzzLoad: whatever a file holds, Load ends with a request that can be sent or
// an error of a known class. Files of up to 64 KiB, to keep rounds short.
func FuzzLoad(f *testing.F) {
	for _, pattern := range []string{"testdata/ok/*/*.yaml", "testdata/bad/*.yaml"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 64<<10 {
			return
		}
		dir := t.TempDir()
		file := filepath.Join(dir, "compose.yaml")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		late := time.AfterFunc(30*time.Second, func() { panic("Load takes for ever on:\n" + string(data)) })
		p, err := compose.Load(t.Context(), compose.Options{Files: []string{file}, ProjectName: "fuzz"})
		late.Stop()
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) && !errors.Is(err, errdefs.ErrNotFound) && !errors.Is(err, errdefs.ErrPermissionDenied) {
				t.Fatalf("unclassed error: %v", err)
			}
			return
		}
		if _, err := proto.Marshal(p.Request); err != nil {
			t.Fatalf("request that can't be sent: %v", err)
		}
		for _, s := range p.Request.Services {
			if s.Name == "" || s.Template.GetImage() == "" || s.Replicas < 0 {
				t.Fatalf("incomplete service %v", s)
			}
		}
	})
}
