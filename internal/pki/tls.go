package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// Caller is the control plane's side: its client certificate, which is only in memory,
// and its checks of the hosts that it calls.
type Caller struct {
	authority *Authority
	current   atomic.Pointer[tls.Certificate]
}

// NewCaller returns a caller with a new certificate. Call Run, which replaces it in time.
func NewCaller(a *Authority) (*Caller, error) {
	c := &Caller{authority: a}
	return c, c.swap()
}

// swap replaces the certificate and its key. Existing connections keep theirs.
func (c *Caller) swap() error {
	key, err := NewKey()
	if err != nil {
		return err
	}
	leaf, err := c.authority.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "Wrenn server"}, URIs: []*url.URL{serverName()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, key.Public(), ServerLasts)
	if err != nil {
		return fmt.Errorf("create the server's certificate: %w", err)
	}
	c.current.Store(&tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf})
	return nil
}

// Run replaces the certificate every 12 hours until ctx is done.
func (c *Caller) Run(ctx context.Context, log *slog.Logger) {
	tick := time.NewTicker(ServerSwaps)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := c.swap(); err != nil {
				log.Error("replace the server's certificate", "error", err)
			}
		case <-ctx.Done():
			return
		}
	}
}

// TLS returns the configuration for calls of a host at an IP address or a DNS name. The
// host's leaf must be signed by the authority, be valid now, and name that address and
// that host. trusted can refuse it, for example if the host was revoked.
func (c *Caller) TLS(host uuid.UUID, address string, trusted func(*x509.Certificate) error) *tls.Config {
	want := HostName(host).String()
	return &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: c.authority.Pool(), ServerName: address,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.current.Load(), nil },
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 || !named(s.PeerCertificates[0], want) {
				return errors.New("the certificate belongs to another host")
			}
			return trusted(s.PeerCertificates[0])
		},
	}
}

// Listener is a host's side: its leaf, which can be replaced while the host serves, and
// its checks of callers.
type Listener struct {
	current atomic.Pointer[tls.Config]
}

// Set replaces the leaf, its private key and the authority (all PEM) for new connections.
func (l *Listener) Set(leafPEM, keyPEM, authorityPEM []byte) error {
	pair, err := tls.X509KeyPair(leafPEM, keyPEM)
	if err != nil {
		return fmt.Errorf("read the host's certificate: %w", err)
	}
	authority, err := ParseCertificate(authorityPEM)
	if err != nil {
		return fmt.Errorf("read the authority's certificate: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(authority)
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: pair.Leaf.NotAfter}); err != nil {
		return fmt.Errorf("the authority did not sign the host's certificate: %w", err)
	}
	l.current.Store(&tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		NextProtos: []string{"h2", "http/1.1"},
		// With a ticket, a caller could return without showing its certificate again.
		SessionTicketsDisabled: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 || !named(s.PeerCertificates[0], serverName().String()) {
				return errors.New("only the control plane may call")
			}
			return nil
		},
	})
	return nil
}

// NotAfter returns when the leaf expires, or the zero time if there is none.
func (l *Listener) NotAfter() time.Time {
	c := l.current.Load()
	if c == nil {
		return time.Time{}
	}
	return c.Certificates[0].Leaf.NotAfter
}

// TLS returns the configuration for the host's server. It always uses the leaf that was
// set last.
func (l *Listener) TLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			if c := l.current.Load(); c != nil {
				return c, nil
			}
			return nil, errors.New("there is no certificate yet")
		},
	}
}

// named reports whether want is the only URI name of a leaf.
func named(cert *x509.Certificate, want string) bool {
	return len(cert.URIs) == 1 && cert.URIs[0].String() == want
}
