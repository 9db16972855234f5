package image

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// errPlainHTTP: a registry can't be reached by HTTPS, and plain HTTP is not allowed.
var errPlainHTTP = errors.New("plain HTTP is not allowed; use HTTPS or list the registry as insecure")

// hostTransport gives each host its own TLS settings, also after a redirect: an
// authority that is trusted for one registry is not trusted for another host.
// It lives for one pull, so that changed certificates are seen by the next.
type hostTransport struct {
	opts  Options
	plain []string // hosts that may be spoken to in plain HTTP
	mu    sync.Mutex
	hosts map[string]*http.Transport
}

func newHostTransport(o Options, plain []string) *hostTransport {
	return &hostTransport{opts: o, plain: plain, hosts: map[string]*http.Transport{}}
}

// RoundTrip implements http.RoundTripper.
func (h *hostTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	host := req.URL.Host
	if req.URL.Scheme != "https" && !isLoopback(req.URL.Hostname()) && !slices.Contains(h.plain, host) {
		return nil, fmt.Errorf("%s: %w", host, errPlainHTTP)
	}
	t, err := h.transport(host)
	if err != nil {
		return nil, err
	}
	return t.RoundTrip(req)
}

func (h *hostTransport) transport(host string) (*http.Transport, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if t := h.hosts[host]; t != nil {
		return t, nil
	}
	conf, err := h.tlsConfig(host)
	if err != nil {
		return nil, err
	}
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		ForceAttemptHTTP2:     true,
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       90 * time.Second,
		TLSHandshakeTimeout:   20 * time.Second,
		ResponseHeaderTimeout: h.opts.StallTimeout,
		TLSClientConfig:       conf,
	}
	h.hosts[host] = t
	return t, nil
}

func (h *hostTransport) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range h.hosts {
		t.CloseIdleConnections()
	}
}

// tlsConfig adds what the certs.d directories have for the host.
func (h *hostTransport) tlsConfig(host string) (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if host == "" || strings.ContainsAny(host, `/\`) || strings.HasPrefix(host, ".") {
		return conf, nil
	}
	for _, base := range h.opts.CertsDirs {
		dir := filepath.Join(base, host)
		entries, err := os.ReadDir(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("certificates of %s: %w", host, err)
		}
		for _, e := range entries {
			name := filepath.Join(dir, e.Name())
			switch filepath.Ext(name) {
			case ".crt":
				if err := addAuthority(conf, name); err != nil {
					return nil, err
				}
			case ".cert":
				pair, err := tls.LoadX509KeyPair(name, strings.TrimSuffix(name, ".cert")+".key")
				if err != nil {
					return nil, fmt.Errorf("client certificate %s: %w", name, err)
				}
				conf.Certificates = append(conf.Certificates, pair)
			}
		}
	}
	return conf, nil
}

func addAuthority(conf *tls.Config, name string) error {
	pem, err := os.ReadFile(name)
	if err != nil {
		return fmt.Errorf("authority %s: %w", name, err)
	}
	if conf.RootCAs == nil {
		if conf.RootCAs, err = x509.SystemCertPool(); err != nil {
			return fmt.Errorf("the system's authorities: %w", err)
		}
	}
	if !conf.RootCAs.AppendCertsFromPEM(pem) {
		return fmt.Errorf("authority %s: no certificate in PEM form", name)
	}
	return nil
}

func isLoopback(host string) bool {
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}
