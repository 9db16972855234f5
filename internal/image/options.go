package image

import (
	"io"
	"log/slog"
	"runtime"
	"time"

	"tandem/internal/clock"
	"tandem/internal/image/layerfs"

	"github.com/google/go-containerregistry/pkg/authn"
)

// Clock is the store's time. The default is the system's.
type Clock = clock.Clock

// Options are a store's settings. The zero value is right for a host.
type Options struct {
	Logger *slog.Logger // default: discards
	Clock  Clock        // default: the system's

	// Mirrors lists, for a registry's host name ("docker.io"), where to look first:
	// "https://mirror.example:5000", "mirror.example/prefix" or, for plain HTTP,
	// "http://...". They are asked in order, then the registry itself. Credentials
	// for the registry are never sent to a mirror.
	Mirrors map[string][]string
	// Insecure lists registries (host or host:port) that may be spoken to in plain
	// HTTP. Loopback always may.
	Insecure []string
	// CertsDirs hold HOST[:PORT]/*.crt (authorities), *.cert + *.key (client
	// certificates), as Docker's do. Default: /etc/tandem/certs.d,
	// /etc/docker/certs.d, /etc/containers/certs.d. SSL_CERT_FILE and SSL_CERT_DIR
	// replace the system's authorities.
	CertsDirs []string
	// Keychain finds credentials when a pull brings none. Default:
	// ~/.docker/config.json and its helpers.
	Keychain authn.Keychain

	Platform string // what Pull and Load choose by default; default: this host's, "linux/amd64"

	MaxImageBytes   int64 // uncompressed layers of one image together; default 64 GiB
	MaxLayerBytes   int64 // one uncompressed layer tar; default 32 GiB
	MaxLayerEntries int   // entries of one layer; default 500,000
	MaxArchiveBytes int64 // one archive given to Load or Import, as it comes; default 64 GiB

	Parallel     int           // layers pulled or converted at once; default 3
	Retries      int           // attempts for a request that fails for a passing reason; default 5
	RetryDelay   time.Duration // before the second attempt, doubled each time; default 500 ms
	StallTimeout time.Duration // a download without a byte for so long is tried again; default 60 s
}

const (
	maxLayers       = 127     // as overlay and Docker
	maxConfigBytes  = 4 << 20 // a config or manifest
	maxArchiveFiles = 20_000  // files of a docker-archive or OCI layout
	maxArchiveMeta  = 64 << 20
	maxArchiveImage = 1000 // images in one archive
)

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if o.Clock == nil {
		o.Clock = clock.System{}
	}
	if o.CertsDirs == nil {
		o.CertsDirs = []string{"/etc/tandem/certs.d", "/etc/docker/certs.d", "/etc/containers/certs.d"}
	}
	if o.Keychain == nil {
		o.Keychain = authn.DefaultKeychain
	}
	if o.Platform == "" {
		o.Platform = "linux/" + runtime.GOARCH
	}
	def(&o.MaxImageBytes, 64<<30)
	def(&o.MaxLayerBytes, 32<<30)
	def(&o.MaxLayerEntries, 500_000)
	def(&o.MaxArchiveBytes, 64<<30)
	def(&o.Parallel, 3)
	def(&o.Retries, 5)
	def(&o.RetryDelay, 500*time.Millisecond)
	def(&o.StallTimeout, time.Minute)
	return o
}

func def[T int | int64 | time.Duration](p *T, v T) {
	if *p <= 0 {
		*p = v
	}
}

func (o Options) limits() layerfs.Limits {
	return layerfs.Limits{MaxEntries: o.MaxLayerEntries, MaxBytes: o.MaxLayerBytes}
}
