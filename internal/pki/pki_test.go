package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/await"
)

func authority(t *testing.T) *Authority {
	t.Helper()
	a, err := NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func key(t *testing.T) crypto.Signer {
	t.Helper()
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// leaf is a key and a certificate for it, both PEM.
type leaf struct{ cert, key []byte }

// hostLeaf returns the leaf of a host for an address.
func hostLeaf(t *testing.T, a *Authority, host uuid.UUID, address string) leaf {
	t.Helper()
	k := key(t)
	csr, err := NewRequest(k, address)
	if err != nil {
		t.Fatal(err)
	}
	cert, parsed, err := a.SignHost(csr, host, address)
	if err != nil {
		t.Fatal(err)
	}
	if lasts := time.Until(parsed.NotAfter); lasts < HostLasts-time.Minute || lasts > HostLasts {
		t.Errorf("the leaf lasts %v", lasts)
	}
	return encode(t, cert, k)
}

func encode(t *testing.T, cert []byte, k crypto.Signer) leaf {
	t.Helper()
	text, err := EncodeKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return leaf{cert, text}
}

// signed returns a leaf that the authority would never sign.
func signed(t *testing.T, a *Authority, c *x509.Certificate, lasts time.Duration) leaf {
	t.Helper()
	k := key(t)
	cert, err := a.sign(c, k.Public(), lasts)
	if err != nil {
		t.Fatal(err)
	}
	return encode(t, pem.EncodeToMemory(&pem.Block{Type: blockCert, Bytes: cert.Raw}), k)
}

// talk makes a caller shake hands with a listener on a real connection and send a byte
// each way. Both ends' errors count: with TLS 1.3, a client's handshake ends before the
// server has checked its certificate.
func talk(t *testing.T, server, client *tls.Config) error {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(await.Hang))
		s := tls.Server(conn, server)
		if err := s.Handshake(); err != nil {
			served <- err
			return
		}
		_, err = s.Write([]byte{1})
		served <- err
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(await.Hang))
	c := tls.Client(conn, client)
	_, err = io.ReadFull(c, make([]byte, 1))
	if err == nil && c.ConnectionState().Version != tls.VersionTLS13 {
		t.Errorf("spoke TLS %x", c.ConnectionState().Version)
	}
	conn.Close()
	return errors.Join(err, <-served)
}

func listener(t *testing.T, a *Authority, l leaf) *Listener {
	t.Helper()
	var s Listener
	if err := s.Set(l.cert, l.key, a.PEM()); err != nil {
		t.Fatal(err)
	}
	return &s
}

func trust(*x509.Certificate) error { return nil }

// TestRefused tries every combination of ends that must not accept each other.
func TestRefused(t *testing.T) {
	ours, theirs := authority(t), authority(t)
	host, other := uuid.New(), uuid.New()
	caller, err := NewCaller(ours)
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := NewCaller(theirs)
	if err != nil {
		t.Fatal(err)
	}
	good := hostLeaf(t, ours, host, "127.0.0.1")
	// as returns the configuration of a caller with a leaf.
	as := func(l leaf) *tls.Config {
		pair, err := tls.X509KeyPair(l.cert, l.key)
		if err != nil {
			t.Fatal(err)
		}
		return &tls.Config{ServerName: "127.0.0.1", RootCAs: ours.Pool(), GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }}
	}
	// serve returns the configuration of a host with a leaf that Listener would refuse.
	serve := func(l leaf) *tls.Config {
		pair, err := tls.X509KeyPair(l.cert, l.key)
		if err != nil {
			t.Fatal(err)
		}
		return &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert}
	}
	serving := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	calling := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	loopback := []net.IP{net.IPv4(127, 0, 0, 1)}
	asHost := func(c x509.Certificate) *x509.Certificate {
		c.ExtKeyUsage, c.IPAddresses, c.URIs = serving, loopback, []*url.URL{HostName(host)}
		return &c
	}
	noURI := asHost(x509.Certificate{})
	noURI.URIs = nil
	toCall := asHost(x509.Certificate{})
	toCall.ExtKeyUsage = calling
	us := caller.TLS(host, "127.0.0.1", trust)
	tests := []struct {
		name           string
		server, client *tls.Config
		ok             bool
	}{
		{"both as they should be", listener(t, ours, good).TLS(), us, true},
		// Refused by the control plane.
		{"a host with an expired leaf", serve(signed(t, ours, asHost(x509.Certificate{}), -time.Second)), us, false},
		{"a host of another authority", serve(hostLeaf(t, theirs, host, "127.0.0.1")), us, false},
		{"a host at another address", listener(t, ours, hostLeaf(t, ours, host, "127.0.0.2")).TLS(), us, false},
		{"a host by name where an address is called", listener(t, ours, hostLeaf(t, ours, host, "localhost")).TLS(), us, false},
		{"another host at this address", listener(t, ours, hostLeaf(t, ours, other, "127.0.0.1")).TLS(), us, false},
		{"a host without a host's name", serve(signed(t, ours, noURI, time.Hour)), us, false},
		{"a leaf that is not for serving", serve(signed(t, ours, toCall, time.Hour)), us, false},
		{"a host that was revoked", listener(t, ours, good).TLS(), caller.TLS(host, "127.0.0.1", func(*x509.Certificate) error { return errors.New("revoked") }), false},
		// Refused by a host.
		{"a caller of another authority", listener(t, ours, good).TLS(), func() *tls.Config { c := stranger.TLS(host, "127.0.0.1", trust); c.RootCAs = ours.Pool(); return c }(), false},
		{"a caller without certificate", listener(t, ours, good).TLS(), &tls.Config{ServerName: "127.0.0.1", RootCAs: ours.Pool()}, false},
		{"another host as caller", listener(t, ours, good).TLS(), as(hostLeaf(t, ours, other, "127.0.0.1")), false},
		{"a caller with a host's name", listener(t, ours, good).TLS(), as(signed(t, ours, &x509.Certificate{ExtKeyUsage: calling, URIs: []*url.URL{HostName(other)}}, time.Hour)), false},
		{"a caller with an expired certificate", listener(t, ours, good).TLS(), as(signed(t, ours, &x509.Certificate{ExtKeyUsage: calling, URIs: []*url.URL{serverName()}}, -time.Second)), false},
		{"a caller that may not call", listener(t, ours, good).TLS(), as(signed(t, ours, &x509.Certificate{ExtKeyUsage: serving, URIs: []*url.URL{serverName()}}, time.Hour)), false},
		{"an old caller", listener(t, ours, good).TLS(), func() *tls.Config { c := us.Clone(); c.MinVersion, c.MaxVersion = 0, tls.VersionTLS12; return c }(), false},
		{"a host without a certificate yet", new(Listener).TLS(), us, false},
	}
	for _, tt := range tests {
		err := talk(t, tt.server, tt.client)
		if (err == nil) != tt.ok {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// TestReplaced replaces both ends' certificates while their configurations are in use.
func TestReplaced(t *testing.T) {
	a := authority(t)
	host := uuid.New()
	caller, err := NewCaller(a)
	if err != nil {
		t.Fatal(err)
	}
	first := hostLeaf(t, a, host, "127.0.0.1")
	l := listener(t, a, first)
	var serials []string
	server, client := l.TLS(), caller.TLS(host, "127.0.0.1", func(c *x509.Certificate) error { serials = append(serials, Serial(c)); return nil })
	if err := talk(t, server, client); err != nil {
		t.Fatal(err)
	}
	before := caller.current.Load().Leaf
	if lasts := time.Until(before.NotAfter); lasts < ServerLasts-time.Minute || lasts > ServerLasts {
		t.Errorf("the server's certificate lasts %v", lasts)
	}
	if err := caller.swap(); err != nil {
		t.Fatal(err)
	}
	second := hostLeaf(t, a, host, "127.0.0.1")
	if err := l.Set(second.cert, second.key, a.PEM()); err != nil {
		t.Fatal(err)
	}
	if err := talk(t, server, client); err != nil {
		t.Fatal(err)
	}
	if len(serials) != 2 || serials[0] == serials[1] {
		t.Errorf("leaves %v", serials)
	}
	if Serial(caller.current.Load().Leaf) == Serial(before) {
		t.Error("the server's certificate is the same")
	}
	for what, err := range map[string]error{
		"another key":       l.Set(second.cert, first.key, a.PEM()),
		"another authority": l.Set(second.cert, second.key, authority(t).PEM()),
		"no PEM":            l.Set(nil, nil, nil),
	} {
		if err == nil {
			t.Errorf("%s was accepted", what)
		}
	}
	if err := talk(t, server, client); err != nil {
		t.Errorf("after attempts to set wrong leaves: %v", err)
	}
}

func TestSignHost(t *testing.T) {
	a := authority(t)
	k := key(t)
	request := func(template x509.CertificateRequest, k crypto.Signer) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &template, k)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: blockCSR, Bytes: der})
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ip := []net.IP{net.ParseIP("192.0.2.1")}
	good := request(x509.CertificateRequest{IPAddresses: ip}, k)
	forged, _ := pem.Decode(good)
	forged.Bytes[len(forged.Bytes)-1] ^= 1
	for name, csr := range map[string][]byte{
		"another address":    request(x509.CertificateRequest{IPAddresses: []net.IP{net.ParseIP("192.0.2.2")}}, k),
		"one address more":   request(x509.CertificateRequest{IPAddresses: append(ip, net.ParseIP("192.0.2.2"))}, k),
		"a name besides":     request(x509.CertificateRequest{IPAddresses: ip, DNSNames: []string{"server"}}, k),
		"a URI besides":      request(x509.CertificateRequest{IPAddresses: ip, URIs: []*url.URL{serverName()}}, k),
		"an e-mail address":  request(x509.CertificateRequest{IPAddresses: ip, EmailAddresses: []string{"a@example.com"}}, k),
		"no names":           request(x509.CertificateRequest{}, k),
		"another curve":      request(x509.CertificateRequest{IPAddresses: ip}, p384),
		"a broken signature": pem.EncodeToMemory(forged),
		"two requests":       append(append([]byte{}, good...), good...),
		"nothing":            nil,
		"no request":         a.PEM(),
	} {
		if _, _, err := a.SignHost(csr, uuid.New(), "192.0.2.1"); err == nil {
			t.Errorf("%s: it was signed", name)
		}
	}
	for _, address := range []string{"192.0.2.1", "2001:db8::1", "host.example"} {
		csr, err := NewRequest(k, address)
		if err != nil {
			t.Fatal(err)
		}
		_, cert, err := a.SignHost(csr, uuid.New(), address)
		if err != nil {
			t.Errorf("%s: %v", address, err)
			continue
		}
		if err := cert.VerifyHostname(address); err != nil {
			t.Error(err)
		}
		if cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign != 0 {
			t.Error("a leaf is allowed to sign")
		}
	}
}

func TestSaveAndLoad(t *testing.T) {
	dir := t.TempDir()
	cert, keyFile := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	a := authority(t)
	if err := a.Save(cert, keyFile); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{cert, keyFile} {
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	b, err := LoadAuthority(cert, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	hostLeaf(t, b, uuid.New(), "127.0.0.1")
	if err := authority(t).Save(cert, keyFile); err == nil {
		t.Error("overwrote an authority")
	}
	if err := authority(t).Save(cert, filepath.Join(dir, "new.key")); err == nil {
		t.Error("overwrote a certificate")
	}
	if _, err := os.Stat(filepath.Join(dir, "new.key")); err == nil {
		t.Error("left a key whose certificate was not written")
	}
	if err := os.Chmod(keyFile, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadAuthority(cert, keyFile); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("it loads a key that others may read: %v", err)
	}
	other := filepath.Join(dir, "other.key")
	if err := authority(t).Save(filepath.Join(dir, "other.crt"), other); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadAuthority(cert, other); err == nil {
		t.Error("it accepts a certificate with another key")
	}
	l := hostLeaf(t, a, uuid.New(), "127.0.0.1")
	leafCert, leafKey := filepath.Join(dir, "leaf.crt"), filepath.Join(dir, "leaf.key")
	if err := errors.Join(os.WriteFile(leafCert, l.cert, 0o600), os.WriteFile(leafKey, l.key, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadAuthority(leafCert, leafKey); err == nil {
		t.Error("it accepts a leaf as an authority")
	}
}
