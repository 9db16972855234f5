// Package store keeps Tandem's state: typed records (the protobuf messages of
// api/tandem/v1/records.proto) in etcd, read from a cache that etcd's watch
// feeds, written in transactions that name the revisions they rely on.
//
//	s, err := store.Open(ctx, store.Options{Dir: "/var/lib/tandem/store"})
//	rev, err := s.Create(ctx, &v1.Project{Meta: &v1.Meta{Name: "shop"}})
//	p, err := store.Get[*v1.Project](s, store.Key{store.Projects, "", "shop"})
//	_, err = store.Update(ctx, s, key, func(p *v1.Project) error { p.ComposeHash = h; return nil })
//
// Without Endpoints the store runs an etcd member of its own inside the process:
// fsync on, no listener at all. Records that reads return are shared with every
// other reader: never modify them, use Update or proto.Clone.
//
// Errors belong to the classes of github.com/containerd/errdefs: NotFound,
// AlreadyExists, Conflict (somebody wrote in between: read again), DataLoss (a
// record that cannot be decoded; the others stay usable), FailedPrecondition
// (another server owns the directory, or it is read-only), ResourceExhausted
// (disk full), Unavailable (etcd does not answer).
//
// A disk that fills up stops no store: see Growing, Space and the architecture's
// page of the store.
package store

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Prefix is where all records live in etcd.
const Prefix = "/tandem/v1/"

// Options say where the state is.
type Options struct {
	// Dir is the state directory of the embedded member, the lock and the key
	// file. Required.
	Dir string
	// Endpoints name an etcd cluster that runs already ("http://10.0.0.1:2379");
	// empty starts an embedded member in Dir.
	Endpoints []string
	// Logger receives warnings; nil discards them.
	Logger *slog.Logger
	// QuotaBytes bounds the data base (default 1 GiB).
	QuotaBytes int64
	// Timeout bounds one request to etcd (default 20 s).
	Timeout time.Duration
}

// Store is the state. Its methods may be called from many goroutines.
type Store struct {
	opts    Options
	log     *slog.Logger
	lock    *os.File
	member  *member // nil with Endpoints
	client  *clientv3.Client
	aead    cipher.AEAD
	cluster string
	reserve *reserve // nil with Endpoints
	keeping sync.WaitGroup

	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{} // the watch loop has ended

	cache cache

	closeOnce sync.Once
	closeErr  error

	failMu sync.Mutex
	failed error
	failCh chan struct{}
}

// Open starts or reaches etcd and fills the cache. A second Open on the same
// directory, from any process, is FailedPrecondition and names the holder.
func Open(ctx context.Context, opts Options) (_ *Store, err error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.Timeout == 0 {
		opts.Timeout = 20 * time.Second
	}
	if opts.QuotaBytes == 0 {
		opts.QuotaBytes = 1 << 30
	}
	if opts.Dir == "" {
		return nil, fmt.Errorf("store without a state directory: %w", errdefs.ErrInvalidArgument)
	}
	s := &Store{opts: opts, log: opts.Logger, done: make(chan struct{}), failCh: make(chan struct{})}
	s.cache.init()
	s.ctx, s.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			s.cancel()
			s.shutdown()
		}
	}()
	if s.lock, err = prepareDir(opts.Dir); err != nil {
		return nil, err
	}
	if s.aead, err = loadKey(filepath.Join(opts.Dir, "secret.key")); err != nil {
		return nil, err
	}
	if len(opts.Endpoints) > 0 {
		s.client, err = clientv3.New(clientv3.Config{Endpoints: opts.Endpoints, DialTimeout: opts.Timeout, Context: s.ctx,
			MaxCallSendMsgSize: maxRequest, MaxCallRecvMsgSize: 64 << 20, DialKeepAliveTime: 10 * time.Second})
		if err != nil {
			return nil, fmt.Errorf("reaching etcd at %v: %w: %w", opts.Endpoints, err, errdefs.ErrUnavailable)
		}
	} else {
		if s.member, err = startMember(ctx, opts, s.fail); err != nil {
			return nil, err
		}
		s.client = s.member.client
	}
	if s.cluster, err = s.ensureClusterID(ctx); err != nil {
		return nil, err
	}
	rev, err := s.load(ctx)
	if err != nil {
		return nil, err
	}
	if s.member != nil {
		e := s.member.etcd.Server
		s.reserve = newReserve(opts.Dir, opts.Logger, func() int64 { return e.Backend().Size() }, e.AppliedIndex)
		s.keeping.Go(func() { s.reserve.keep(s.ctx) })
	}
	go s.follow(rev)
	return s, nil
}

// ClusterID is random, made at the first Open, and stays.
func (s *Store) ClusterID() string { return s.cluster }

// Space says how it stands with the disk of the state directory, and gives a
// channel that is closed when it becomes short or has space again. Of an etcd that
// runs elsewhere nothing is known.
func (s *Store) Space() (Space, <-chan struct{}) {
	if s.reserve == nil {
		return Space{}, nil
	}
	s.reserve.mu.Lock()
	defer s.reserve.mu.Unlock()
	return s.reserve.space, s.reserve.moved
}

type growing struct{}

// Growing marks the writes of whoever uses this context as wishes for more: while
// the disk of the state directory is short they are ResourceExhausted, unless they
// only take things away. All other writes go on from what is kept in reserve.
func Growing(ctx context.Context) context.Context { return context.WithValue(ctx, growing{}, true) }

// admit says whether a write of so many bytes finds its space.
func (s *Store) admit(ctx context.Context, bytes int64, adds bool) error {
	if s.reserve == nil {
		return nil
	}
	return s.reserve.admit(bytes, adds && ctx.Value(growing{}) != nil)
}

// Failed is closed when the store can't go on (disk full, data base broken);
// Err then says why. A server should end: a restart is safe at any time.
func (s *Store) Failed() <-chan struct{} { return s.failCh }

// Err is why the store failed; nil while it works.
func (s *Store) Err() error {
	s.failMu.Lock()
	defer s.failMu.Unlock()
	return s.failed
}

func (s *Store) fail(err error) {
	s.failMu.Lock()
	defer s.failMu.Unlock()
	if s.failed == nil {
		s.failed = err
		s.log.Error("the state store has failed", "err", err)
		close(s.failCh)
		s.cancel()
	}
}

// Close stops the store and lets the directory go. Every write that was
// acknowledged is on disk.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		s.cancel()
		<-s.done
		s.keeping.Wait()
		s.closeErr = s.shutdown()
	})
	return s.closeErr
}

func (s *Store) shutdown() error {
	var errs []error
	if s.member != nil {
		errs = append(errs, s.member.close(s.Err() != nil))
	} else if s.client != nil {
		errs = append(errs, s.client.Close())
	}
	s.cache.close()
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

const clusterKey = "/tandem/cluster-id"

func (s *Store) ensureClusterID(ctx context.Context) (string, error) {
	ctx, cancel := s.reqCtx(ctx)
	defer cancel()
	var b [16]byte
	rand.Read(b[:])
	id := hex.EncodeToString(b[:])
	res, err := s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(clusterKey), "=", 0)).
		Then(clientv3.OpPut(clusterKey, id)).
		Else(clientv3.OpGet(clusterKey)).Commit()
	if err != nil {
		return "", s.wrap("reading the cluster's id", err)
	}
	if !res.Succeeded {
		kvs := res.Responses[0].GetResponseRange().Kvs
		if len(kvs) == 1 {
			id = string(kvs[0].Value)
		}
	}
	return id, nil
}

func (s *Store) reqCtx(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, s.opts.Timeout)
	stop := context.AfterFunc(s.ctx, cancel)
	return ctx, func() { stop(); cancel() }
}
