package store

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// What one transaction may hold: enough for a project of thousands of containers.
const (
	maxRequest = 32 << 20
	maxTxnOps  = 16384
)

func init() {
	// Three segments of the log are allocated ahead (see reserve): of 64 MB they
	// would be most of a small state directory.
	wal.SegmentSizeBytes = segmentBytes
}

// member is the embedded etcd.
type member struct {
	etcd   *embed.Etcd
	client *clientv3.Client
	log    *bridge
}

func startMember(ctx context.Context, opts Options, fail func(error)) (*member, error) {
	cfg := embed.NewConfig()
	cfg.Name = "tandem"
	cfg.Dir = filepath.Join(opts.Dir, "etcd")
	// One member talks to nobody: no listeners. The advertised URLs are only its
	// name in the membership.
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil
	cfg.ListenClientHttpUrls, cfg.ListenMetricsUrls = nil, nil
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	// Few ticks: there is nobody to lose an election to, and an idle server
	// should cost nothing.
	cfg.TickMs, cfg.ElectionMs = 200, 1000
	cfg.PreVote = false
	cfg.SnapshotCount = snapEvery
	cfg.SnapshotCatchUpEntries = 100
	cfg.MaxSnapFiles, cfg.MaxWalFiles = 2, 2
	cfg.QuotaBackendBytes = opts.QuotaBytes
	cfg.MaxTxnOps = maxTxnOps
	cfg.MaxRequestBytes = maxRequest
	cfg.AutoCompactionMode = embed.CompactorModeRevision
	cfg.AutoCompactionRetention = "2000"
	cfg.WarningApplyDuration = 2 * time.Second
	cfg.WarningUnaryRequestDuration = 5 * time.Second
	cfg.DowngradeCheckTime = time.Hour
	cfg.EnableGRPCGateway = false
	cfg.BackendBatchInterval = 100 * time.Millisecond
	cfg.BackendBatchLimit = 10000

	br := &bridge{log: opts.Logger, fatal: func(msg string) {
		fail(classOfFatal(opts.Dir, msg))
	}}
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(br, zap.WithFatalHook(zapcore.WriteThenGoexit), zap.WithPanicHook(zapcore.WriteThenGoexit)))

	// etcd ends the goroutine that meets a fatal error (see the hooks): so it runs
	// in one of its own here.
	type result struct {
		e   *embed.Etcd
		err error
	}
	ch := make(chan result, 1)
	go func() {
		r := result{err: fmt.Errorf("etcd in %s could not start: %w", cfg.Dir, errdefs.ErrDataLoss)}
		defer func() {
			if p := recover(); p != nil {
				r = result{err: fmt.Errorf("the state in %s can't be read, its files seem damaged: restore a backup (%v): %w", cfg.Dir, p, errdefs.ErrDataLoss)}
			}
			if f := br.last(); r.err != nil && f != "" {
				r.err = classOfFatal(opts.Dir, f)
			}
			ch <- r
		}()
		r.e, r.err = embed.StartEtcd(cfg)
		if r.err != nil {
			r.err = fmt.Errorf("starting etcd in %s: %w: %w", cfg.Dir, r.err, diskClass(r.err))
		}
	}()
	var r result
	select {
	case r = <-ch:
	case <-ctx.Done():
		return nil, fmt.Errorf("starting etcd in %s: %w", cfg.Dir, ctx.Err())
	}
	if r.err != nil {
		return nil, r.err
	}
	select {
	case <-r.e.Server.ReadyNotify():
	case <-ctx.Done():
		r.e.Close()
		return nil, fmt.Errorf("waiting for etcd in %s: %w", cfg.Dir, ctx.Err())
	case <-time.After(60 * time.Second):
		r.e.Close()
		return nil, fmt.Errorf("etcd in %s did not become ready: %w", cfg.Dir, errdefs.ErrUnavailable)
	}
	return &member{etcd: r.e, client: v3client.New(r.e.Server), log: br}, nil
}

// close stops etcd. A failed one may hang on its own dead parts: it gets a bound.
func (m *member) close(failed bool) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.client.Close()
		m.etcd.Close()
	}()
	limit := 30 * time.Second
	if failed {
		limit = 2 * time.Second
	}
	select {
	case <-done:
		return nil
	case <-time.After(limit):
		return fmt.Errorf("etcd did not stop in %s: %w", limit, context.DeadlineExceeded)
	}
}

// bridge hands etcd's zap log to slog: warnings and worse only.
type bridge struct {
	log    *slog.Logger
	fields []zapcore.Field
	fatal  func(msg string)
	parent *bridge
	msg    atomicString
}

func (b *bridge) root() *bridge {
	if b.parent != nil {
		return b.parent
	}
	return b
}

func (b *bridge) last() string { return b.root().msg.load() }

// Enabled implements zapcore.Core.
func (b *bridge) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

// With implements zapcore.Core.
func (b *bridge) With(f []zapcore.Field) zapcore.Core {
	return &bridge{log: b.log, fatal: b.fatal, parent: b.root(), fields: append(b.fields[:len(b.fields):len(b.fields)], f...)}
}

// Check implements zapcore.Core.
func (b *bridge) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if b.Enabled(e.Level) {
		return ce.AddCore(e, b)
	}
	return ce
}

// Write implements zapcore.Core.
func (b *bridge) Write(e zapcore.Entry, f []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, x := range append(b.fields[:len(b.fields):len(b.fields)], f...) {
		x.AddTo(enc)
	}
	var args []any
	for k, v := range enc.Fields {
		args = append(args, k, v)
	}
	level := slog.LevelDebug // etcd warns a lot about what is no trouble for one member
	if e.Level >= zapcore.ErrorLevel {
		level = slog.LevelWarn
	}
	b.log.Log(context.Background(), level, "etcd: "+e.Message, args...)
	if e.Level >= zapcore.DPanicLevel {
		msg := e.Message
		if v, ok := enc.Fields["error"]; ok {
			msg = fmt.Sprintf("%s: %v", msg, v)
		}
		b.root().msg.store(msg)
		b.fatal(msg)
	}
	return nil
}

// Sync implements zapcore.Core.
func (b *bridge) Sync() error { return nil }
