package agent

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/files"
)

// stateDir is the agent's own directory. All writes are
// atomic: a new file, then a rename.
//
//	host-id            this host's id, random, made once
//	lock               held by the one agent that owns the directory
//	ballast            space for the records below when the disk is full
//	cluster-id         the cluster this host belongs to: the first seen
//	spec.pb            the HostSpec last accepted
//	containers/ID.json what was done for a container
//	machines/ID.json   what was done for a machine
type stateDir struct {
	dir     string
	lock    *os.File
	ballast *ballast
}

var validID = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)

func openState(dir string) (*stateDir, error) {
	s := &stateDir{dir: dir}
	for _, d := range []string{s.dir, s.path("containers"), s.path("machines")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("agent's state directory: %w", err)
		}
	}
	f, err := os.OpenFile(s.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("agent's lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another agent uses %s (stop it, or give this one its own --state-dir): %w", dir, errdefs.ErrFailedPrecondition)
	}
	s.lock = f
	s.ballast = openBallast(s.path("ballast"))
	return s, nil
}

func (s *stateDir) close() { s.lock.Close() }

func (s *stateDir) path(p ...string) string {
	return filepath.Join(append([]string{s.dir}, p...)...)
}

// write replaces a file. With sync its content outlives a power cut.
func (s *stateDir) write(name string, data []byte, sync bool) error {
	replace := files.Replace
	if sync {
		replace = files.ReplaceDurably
	}
	s.ballast.fill()
	if err := s.ballast.write(func() error { return replace(s.path(name), data, 0o600) }); err != nil {
		return fmt.Errorf("agent's state: write %s: %w", name, err)
	}
	return nil
}

// read returns nil when there is no such file.
func (s *stateDir) read(name string) ([]byte, error) {
	b, err := os.ReadFile(s.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("agent's state: %w", err)
	}
	return b, nil
}

func (s *stateDir) remove(name string) error {
	if err := os.Remove(s.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("agent's state: %w", err)
	}
	return nil
}

// hostID makes the host's id at the first call and keeps it.
func (s *stateDir) hostID(rand io.Reader) (string, error) {
	b, err := s.read("host-id")
	if err != nil {
		return "", err
	}
	if id := strings.TrimSpace(string(b)); validID.MatchString(id) {
		return id, nil
	}
	id, err := randomID(rand, "h-")
	if err != nil {
		return "", err
	}
	return id, s.write("host-id", []byte(id+"\n"), true)
}

func randomID(rand io.Reader, prefix string) (string, error) {
	var b [6]byte
	if _, err := io.ReadFull(rand, b[:]); err != nil {
		return "", fmt.Errorf("random id: %w", err)
	}
	return prefix + hex.EncodeToString(b[:]), nil
}

// clusterID remembers the first cluster that was seen; another one is refused.
func (s *stateDir) clusterID(id string) error {
	b, err := s.read("cluster-id")
	if err != nil {
		return err
	}
	have := strings.TrimSpace(string(b))
	switch {
	case have == id || id == "":
		return nil
	case have == "":
		return s.write("cluster-id", []byte(id+"\n"), true)
	}
	return fmt.Errorf("this host belongs to cluster %s, not to %s (its workloads would be lost; use a fresh --state-dir to join another cluster): %w", have, id, errdefs.ErrFailedPrecondition)
}

func (s *stateDir) loadSpec() (*v1.HostSpec, error) {
	b, err := s.read("spec.pb")
	if err != nil || b == nil {
		return nil, err
	}
	spec := &v1.HostSpec{}
	if err := proto.Unmarshal(b, spec); err != nil {
		return nil, fmt.Errorf("agent's state: spec.pb can't be read (it is written anew by the next change from the server): %w: %w", err, errdefs.ErrDataLoss)
	}
	return spec, nil
}

func (s *stateDir) saveSpec(spec *v1.HostSpec) error {
	b, err := proto.Marshal(spec)
	if err != nil {
		return err
	}
	return s.write("spec.pb", b, true)
}

// loadRecords reads all records of a kind; one that can't be read is skipped
// and named in bad.
func loadRecords[T any](s *stateDir, kind string) (recs map[string]*T, bad []string, err error) {
	recs = map[string]*T{}
	entries, err := os.ReadDir(s.path(kind))
	if err != nil {
		return nil, nil, fmt.Errorf("agent's state: %w", err)
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, files.Temp) {
			os.Remove(s.path(kind, name))
			continue
		}
		id, ok := strings.CutSuffix(name, ".json")
		if !ok {
			continue
		}
		r := new(T)
		b, err := os.ReadFile(s.path(kind, name))
		if err == nil {
			err = json.Unmarshal(b, r)
		}
		if err != nil {
			// The id still tells that something was made for it: an empty record
			// makes the actor look at the world and clean up or go on.
			bad = append(bad, name)
			r = new(T)
		}
		recs[id] = r
	}
	return recs, bad, nil
}

func saveRecord(s *stateDir, kind, id string, rec any) error {
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return s.write(kind+"/"+id+".json", b, false)
}
