package hosts

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/pki"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// TestWrongCertificates has hosts with certificates that must be refused: neither calls
// nor proxied requests reach them.
func TestWrongCertificates(t *testing.T) {
	ca, err := pki.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	f := newFleet(t, Config{Authority: ca})
	ctx := context.Background()
	host, token := f.add()
	other, _ := f.add()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	// sign creates a leaf that the authority itself would not always sign.
	sign := func(ca *pki.Authority, names *url.URL, address string, lasts time.Duration) tls.Certificate {
		dir := t.TempDir()
		certFile, keyFile := filepath.Join(dir, "crt"), filepath.Join(dir, "key")
		if err := ca.Save(certFile, keyFile); err != nil {
			t.Fatal(err)
		}
		issuer, err := tls.LoadX509KeyPair(certFile, keyFile)
		if err != nil {
			t.Fatal(err)
		}
		serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
		if err != nil {
			t.Fatal(err)
		}
		leaf := &x509.Certificate{
			SerialNumber: serial, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(lasts), IPAddresses: []net.IP{net.ParseIP(address)}, URIs: []*url.URL{names},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}
		der, err := x509.CreateCertificate(rand.Reader, leaf, issuer.Leaf, key.Public(), issuer.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		// As if the host had been given it.
		f.exec("INSERT INTO host_certificates (serial, host_id, not_after) VALUES ($1, $2, now() + interval '1 day')", serial.Text(16), host)
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	var shown atomic.Pointer[tls.Certificate]
	var reached atomic.Int64
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentHandler(server{}))
	mux.HandleFunc("/proxy/", func(http.ResponseWriter, *http.Request) {})
	web := netaddr.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached.Add(1)
		mux.ServeHTTP(w, r)
	}))
	web.ErrorLog = log.New(io.Discard, "", 0)
	web.TLSConfig = &tls.Config{NextProtos: []string{"h2", "http/1.1"}, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return shown.Load(), nil }}
	go web.ServeTLS(l, "", "")
	t.Cleanup(func() { web.Close() })
	csr, err := pki.NewRequest(key, "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	c, err := f.Enroll(ctx, Registration{Token: token, URL: "https://" + l.Addr().String(), Refresh: sum("r1"), CSR: csr})
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(c.Certificate)
	given := tls.Certificate{Certificate: [][]byte{block.Bytes}, PrivateKey: key}
	stranger, err := pki.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	name := pki.HostName(host)
	tests := []struct {
		what string
		leaf tls.Certificate
		why  string // "": it is accepted
	}{
		{"what it was given", given, ""},
		{"one as it would be given", sign(ca, name, "127.0.0.1", time.Hour), ""},
		{"an expired one", sign(ca, name, "127.0.0.1", -time.Second), "expired"},
		{"another authority's", sign(stranger, name, "127.0.0.1", time.Hour), "unknown authority"},
		{"another address's", sign(ca, name, "127.0.0.2", time.Hour), "valid for 127.0.0.2"},
		{"another host's", sign(ca, pki.HostName(other), "127.0.0.1", time.Hour), "another host"},
		{"a revoked one", given, "revoked"},
	}
	for _, tt := range tests {
		if tt.why == "revoked" {
			f.exec("DELETE FROM host_certificates WHERE host_id = $1", host)
		}
		// Another registry, as after a restart, has no certificates cached.
		r, err := Open(f.Registry.Config)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Refresh(ctx); err != nil {
			t.Fatal(err)
		}
		h, err := r.Get(&host)
		if err != nil {
			t.Fatal(err)
		}
		shown.Store(&tt.leaf)
		before := reached.Load()
		called := r.Contact(ctx, h)
		resp, carried := (&http.Client{Transport: h.Transport()}).Get("http://agent/proxy/x")
		if carried == nil {
			resp.Body.Close()
		}
		r.Close()
		for by, err := range map[string]error{"a call": called, "a request": carried} {
			switch {
			case tt.why == "" && err != nil:
				t.Errorf("%s to a host with %s: %v", by, tt.what, err)
			case tt.why != "" && (err == nil || !strings.Contains(err.Error(), tt.why)):
				t.Errorf("%s to a host with %s: %v, want %q", by, tt.what, err, tt.why)
			}
		}
		if n := reached.Load() - before; (tt.why == "") != (n == 2) || tt.why != "" && n != 0 {
			t.Errorf("a host with %s got %d requests", tt.what, n)
		}
	}
}

// TestForgedTokens has hosts' tokens that the control plane's own key signed, with
// contents that it must refuse.
func TestForgedTokens(t *testing.T) {
	f := newFleet(t, Config{})
	host, token := f.add()
	if _, err := f.Enroll(t.Context(), Registration{Token: token, URL: "http://127.0.0.1:7070", Refresh: sum("r1")}); err != nil {
		t.Fatal(err)
	}
	good := claims{Epoch: 1, RegisteredClaims: jwt.RegisteredClaims{Issuer: issuer, Audience: jwt.ClaimStrings{audience}, Subject: id.Format(id.Host, host), ExpiresAt: jwt.NewNumericDate(time.Now().Add(time.Minute))}}
	for what, change := range map[string]func(*claims){
		"":                    func(*claims) {},
		"expired":             func(c *claims) { c.ExpiresAt = jwt.NewNumericDate(time.Now().Add(-time.Second)) },
		"without an end":      func(c *claims) { c.ExpiresAt = nil },
		"for something else":  func(c *claims) { c.Audience = jwt.ClaimStrings{"wrenn-session"} },
		"another issuer's":    func(c *claims) { c.Issuer = "x" },
		"of another host":     func(c *claims) { c.Subject = id.Format(id.Host, uuid.New()) },
		"of no host":          func(c *claims) { c.Subject = id.Format(id.User, host) },
		"of before":           func(c *claims) { c.Epoch = 0 },
		"of a time not begun": func(c *claims) { c.NotBefore = jwt.NewNumericDate(time.Now().Add(time.Minute)) },
	} {
		c := good
		change(&c)
		token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, c).SignedString(f.Tokens.HostKey())
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Beat(t.Context(), token, Specs{})
		if what == "" && err != nil {
			t.Errorf("a good token: %v", err)
		} else if what != "" {
			f.refused("a token "+what, err, fault.Unauthenticated)
		}
	}
}
