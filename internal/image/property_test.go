package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"pgregory.net/rapid"
	"tandem/internal/image/imagetest"
)

// TestNothingNeededIsEverLost does random things to a store and to a model of
// it, and compares names, leases and files after each.
func TestNothingNeededIsEverLost(t *testing.T) {
	ctx := context.Background()
	archives, ids := make([][]byte, 4), make([]string, 6)
	reg := newRegistry(t, false)
	remotes := make([]string, 2)
	for i := range remotes {
		img := appendLayer(t, smallImage(t, "shared", 2), fileLayer(fmt.Sprint("own ", i)))
		remotes[i] = push(t, reg, fmt.Sprintf("app:%d", i), img)
		id, err := img.ConfigName()
		if err != nil {
			t.Fatal(err)
		}
		ids[4+i] = id.String()
	}
	probe := openStore(t, Options{Platform: "linux/amd64"})
	for i := range archives {
		archives[i] = appArchive(t, i)
		images, err := probe.Load(ctx, bytes.NewReader(archives[i]), nil)
		if err != nil {
			t.Fatal(err)
		}
		ids[i] = images[0].Id
	}
	base := t.TempDir()
	rapid.Check(t, func(r *rapid.T) {
		dir, err := os.MkdirTemp(base, "store-")
		if err != nil {
			r.Fatal(err)
		}
		s, err := Open(dir, pullOptions())
		if err != nil {
			r.Fatal(err)
		}
		defer func() { s.Close() }()
		m := &model{names: map[string]string{}, leases: map[string]map[string]bool{}, present: map[string]bool{}}
		pick := func(what string, n int) int { return rapid.IntRange(0, n-1).Draw(r, what) }
		name := func() string {
			n := pick("name", 8)
			if n >= 6 {
				return remotes[n-6]
			}
			return fmt.Sprintf("docker.io/library/app:%d", n)
		}
		holder := func() string { return fmt.Sprintf("c%d", pick("holder", 3)) }
		steps := rapid.IntRange(1, 25).Draw(r, "steps")
		for range steps {
			switch op := rapid.SampledFrom([]string{"load", "load", "pull", "tag", "lease", "release", "remove", "force", "removeID", "prune", "pruneAll", "reopen"}).Draw(r, "op"); op {
			case "load":
				i := pick("image", 4)
				if _, err := s.Load(ctx, bytes.NewReader(archives[i]), nil); err != nil {
					r.Fatal(err)
				}
				m.present[ids[i]] = true
				m.names[fmt.Sprintf("docker.io/library/app:%d", i)] = ids[i]
			case "pull":
				i := pick("image", 2)
				if _, err := s.Pull(ctx, remotes[i], PullOptions{}); err != nil {
					r.Fatal(err)
				}
				m.present[ids[4+i]] = true
				m.names[remotes[i]] = ids[4+i]
			case "tag":
				from, to := name(), name()
				err := s.Tag(ctx, from, to)
				if id := m.names[from]; expect(r, "tag", err, id != "", errdefs.ErrNotFound) {
					m.names[to] = id
				}
			case "lease":
				n, h := name(), holder()
				err := s.Lease(ctx, h, n)
				if id := m.names[n]; expect(r, "lease", err, id != "", errdefs.ErrNotFound) {
					if m.leases[h] == nil {
						m.leases[h] = map[string]bool{}
					}
					m.leases[h][id] = true
				}
			case "release":
				h := holder()
				if err := s.Release(ctx, h); err != nil {
					r.Fatal(err)
				}
				delete(m.leases, h)
			case "remove", "force":
				n := name()
				id := m.names[n]
				_, _, err := s.Remove(ctx, n, op == "force")
				switch last := len(m.namesOf(id)) == 1; {
				case id == "":
					expect(r, op, err, false, errdefs.ErrNotFound)
				case expect(r, op, err, op == "force" || !last || !m.leased(id), errdefs.ErrFailedPrecondition):
					delete(m.names, n)
					if last && !m.leased(id) {
						delete(m.present, id)
					}
				}
			case "removeID":
				id := ids[pick("image", 6)]
				_, _, err := s.Remove(ctx, id, false)
				switch {
				case !m.present[id]:
					expect(r, op, err, false, errdefs.ErrNotFound)
				case expect(r, op, err, len(m.namesOf(id)) < 2 && !m.leased(id), errdefs.ErrFailedPrecondition):
					for _, n := range m.namesOf(id) {
						delete(m.names, n)
					}
					delete(m.present, id)
				}
			case "prune", "pruneAll":
				if _, _, err := s.Prune(ctx, op == "pruneAll"); err != nil {
					r.Fatal(err)
				}
				for id := range m.present {
					if !m.leased(id) && (op == "pruneAll" || len(m.namesOf(id)) == 0) {
						for _, n := range m.namesOf(id) {
							delete(m.names, n)
						}
						delete(m.present, id)
					}
				}
			case "reopen":
				if err := s.Close(); err != nil {
					r.Fatal(err)
				}
				if s, err = Open(dir, pullOptions()); err != nil {
					r.Fatal(err)
				}
			}
			m.compare(ctx, r, s)
		}
	})
}

func fileLayer(content string) *imagetest.Layer {
	l := &imagetest.Layer{}
	l.File("own", 0o644, content)
	return l
}

func expect(r *rapid.T, what string, err error, ok bool, class error) bool {
	r.Helper()
	if ok != (err == nil) || !ok && !errors.Is(err, class) {
		r.Fatalf("%s: %v, want success %v or %v", what, err, ok, class)
	}
	return ok
}

// model is what a store must know.
type model struct {
	names   map[string]string
	leases  map[string]map[string]bool
	present map[string]bool
}

func (m *model) namesOf(id string) (out []string) {
	for n, i := range m.names {
		if i == id {
			out = append(out, n)
		}
	}
	sort.Strings(out)
	return out
}

func (m *model) leased(id string) bool {
	for _, l := range m.leases {
		if l[id] {
			return true
		}
	}
	return false
}

func (m *model) compare(ctx context.Context, r *rapid.T, s *LocalStore) {
	r.Helper()
	list, err := s.List(ctx)
	if err != nil {
		r.Fatal(err)
	}
	if len(list) != len(m.present) {
		r.Fatalf("%d images, want %d", len(list), len(m.present))
	}
	for _, img := range list {
		if !m.present[img.Id] || strings.Join(img.Names, " ") != strings.Join(m.namesOf(img.Id), " ") || img.InUse != m.leased(img.Id) {
			r.Fatalf("image %v, want names %v, in use %v", img, m.namesOf(img.Id), m.leased(img.Id))
		}
		if img.InUse {
			if layers, err := s.Layers(ctx, img.Id, nil); err != nil || len(layers) != 3 {
				r.Fatalf("layers of a leased image: %v, %v", layers, err)
			}
		}
	}
	assertSound(r, s, false)
}
