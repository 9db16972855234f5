package store

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

// Kind is a kind of record.
type Kind string

// The kinds.
const (
	Projects   Kind = "project"
	Networks   Kind = "network"
	Services   Kind = "service"
	Containers Kind = "container"
	Machines   Kind = "machine"
	Volumes    Kind = "volume"
	Hosts      Kind = "host"
	Policies   Kind = "policy"
)

// PolicyKey names the one record of its kind.
var PolicyKey = Key{Kind: Policies, Name: "cluster"}

// Kinds lists all kinds.
var Kinds = []Kind{Projects, Networks, Services, Containers, Machines, Volumes, Hosts, Policies}

// Record is one of the messages of records.proto.
type Record interface {
	proto.Message
	GetMeta() *v1.Meta
}

// Key names a record: project is empty for what belongs to none.
type Key struct {
	Kind    Kind
	Project string
	Name    string
}

// String is how errors name the record: "container shop/web-1".
func (k Key) String() string {
	if k.Project == "" {
		return string(k.Kind) + " " + k.Name
	}
	return string(k.Kind) + " " + k.Project + "/" + k.Name
}

const noProject = "_"

func (k Key) path() string {
	p := k.Project
	if p == "" {
		p = noProject
	}
	return Prefix + string(k.Kind) + "/" + p + "/" + k.Name
}

func parsePath(path string) (Key, bool) {
	p := strings.Split(strings.TrimPrefix(path, Prefix), "/")
	if len(p) != 3 || newRecord(Kind(p[0])) == nil || p[1] == "" || p[2] == "" {
		return Key{}, false
	}
	if p[1] == noProject {
		p[1] = ""
	}
	return Key{Kind(p[0]), p[1], p[2]}, true
}

var part = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// KeyOf is where a record lives.
func KeyOf(r Record) Key {
	return Key{KindOf(r), r.GetMeta().GetProject(), r.GetMeta().GetName()}
}

func checkKey(k Key) error {
	if k.Kind == "" || !part.MatchString(k.Name) || (k.Project != "" && !part.MatchString(k.Project)) {
		return fmt.Errorf("%q is no name for a %s: letters, digits and _.- only, at most 128: %w", strings.TrimPrefix(k.Project+"/"+k.Name, "/"), k.Kind, errdefs.ErrInvalidArgument)
	}
	return nil
}

// KindOf is the kind of a record.
func KindOf(r Record) Kind {
	switch r.(type) {
	case *v1.Project:
		return Projects
	case *v1.Network:
		return Networks
	case *v1.Service:
		return Services
	case *v1.Container:
		return Containers
	case *v1.Machine:
		return Machines
	case *v1.Volume:
		return Volumes
	case *v1.Host:
		return Hosts
	case *v1.Policy:
		return Policies
	}
	return ""
}

func newRecord(k Kind) Record {
	switch k {
	case Projects:
		return &v1.Project{Meta: &v1.Meta{}}
	case Networks:
		return &v1.Network{Meta: &v1.Meta{}}
	case Services:
		return &v1.Service{Meta: &v1.Meta{}}
	case Containers:
		return &v1.Container{Meta: &v1.Meta{}}
	case Machines:
		return &v1.Machine{Meta: &v1.Meta{}}
	case Volumes:
		return &v1.Volume{Meta: &v1.Meta{}}
	case Hosts:
		return &v1.Host{Meta: &v1.Meta{}}
	case Policies:
		return &v1.Policy{Meta: &v1.Meta{}}
	}
	return nil
}

// sealMark begins content that is encrypted.
var sealMark = []byte("\x00tandem-sealed-1\x00")

func filesOf(r Record) []*v1.File {
	switch x := r.(type) {
	case *v1.Service:
		return x.GetTemplate().GetFiles()
	case *v1.Container:
		return x.GetSpec().GetFiles()
	}
	return nil
}

// encode seals what must not lie on disk in the clear, and marshals. The record
// itself is not changed.
func (s *Store) encode(k Key, r Record) ([]byte, error) {
	c := r
	if len(filesOf(r)) > 0 || r.GetMeta().GetRevision() != 0 {
		c = proto.Clone(r).(Record)
		c.GetMeta().Revision = 0
		for _, f := range filesOf(c) {
			nonce := make([]byte, s.aead.NonceSize())
			rand.Read(nonce)
			f.Content = append(append(bytes.Clone(sealMark), nonce...), s.aead.Seal(nil, nonce, f.Content, sealContext(k, f))...)
		}
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", k, err, errdefs.ErrInvalidArgument)
	}
	return b, nil
}

// sealContext binds sealed content to its place: it can't be moved elsewhere.
func sealContext(k Key, f *v1.File) []byte { return []byte(k.path() + "\x00" + f.Target) }

// decode is encode's inverse; an error is of class DataLoss and names the record.
func (s *Store) decode(k Key, b []byte, rev int64) (Record, error) {
	r := newRecord(k.Kind)
	if err := proto.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s is corrupt and left out: %w: %w", k, err, errdefs.ErrDataLoss)
	}
	m := r.GetMeta()
	if m.GetName() != k.Name || m.GetProject() != k.Project {
		return nil, fmt.Errorf("%s is corrupt and left out: it says that it is %q of project %q: %w", k, m.GetName(), m.GetProject(), errdefs.ErrDataLoss)
	}
	for _, f := range filesOf(r) {
		sealed, ok := bytes.CutPrefix(f.Content, sealMark)
		if !ok || len(sealed) < s.aead.NonceSize() {
			return nil, fmt.Errorf("%s: file %s is not sealed: %w", k, f.Target, errdefs.ErrDataLoss)
		}
		n := s.aead.NonceSize()
		plain, err := s.aead.Open(nil, sealed[:n], sealed[n:], sealContext(k, f))
		if err != nil {
			return nil, fmt.Errorf("%s: file %s can't be decrypted (is secret.key this cluster's?): %w", k, f.Target, errdefs.ErrDataLoss)
		}
		f.Content = plain
	}
	m.Revision = uint64(rev)
	return r, nil
}
