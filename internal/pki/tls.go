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

// Caller is the control plane's side: a client certificate that is in memory
// alone, and what it asks of the hosts that it calls.
type Caller struct {
	authority *Authority
	current   atomic.Pointer[tls.Certificate]
}

// NewCaller makes a caller with a fresh certificate. Run must run for it to
// be replaced in time.
func NewCaller(a *Authority) (*Caller, error) {
	c := &Caller{authority: a}
	return c, c.swap()
}

// swap replaces the certificate and its key. Connections that there are keep theirs.
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
		return fmt.Errorf("make the server's certificate: %w", err)
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

// TLS is how the host with the id, at an IP address or a DNS name, is called.
// Its leaf must be the authority's, hold now, name that address and that
// host, and trusted must not object to it: that is where a host that was
// revoked is refused.
func (c *Caller) TLS(host uuid.UUID, address string, trusted func(*x509.Certificate) error) *tls.Config {
	want := HostName(host).String()
	return &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: c.authority.Pool(), ServerName: address,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.current.Load(), nil },
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 || !named(s.PeerCertificates[0], want) {
				return errors.New("the certificate is another host's")
			}
			return trusted(s.PeerCertificates[0])
		},
	}
}

// Listener is a host's side: its leaf, which is replaced while it is served,
// and what it asks of those who call.
type Listener struct {
	current atomic.Pointer[tls.Config]
}

// Set replaces the leaf and its private key and the authority, all PEM, for
// the connections that come from now on.
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
		return fmt.Errorf("the host's certificate is not the authority's: %w", err)
	}
	l.current.Store(&tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		NextProtos: []string{"h2", "http/1.1"},
		// A ticket would let a caller back in without showing its certificate again.
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

// NotAfter is when the leaf ends; zero: there is none.
func (l *Listener) NotAfter() time.Time {
	c := l.current.Load()
	if c == nil {
		return time.Time{}
	}
	return c.Certificates[0].Leaf.NotAfter
}

// TLS is how callers are served: always with the leaf that was set last.
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

// named says whether a leaf's one URI name is the one given.
func named(cert *x509.Certificate, want string) bool {
	return len(cert.URIs) == 1 && cert.URIs[0].String() == want
}
