// Package pki is the certificates by which the control plane and hosts' agents
// know each other: an authority of the installation's own, leaves for hosts,
// and the control plane's own client certificate. All keys are ECDSA P-256,
// all connections TLS 1.3.
//
// A leaf says what it is for twice: by its extended key usage (a host's serves,
// the control plane's calls), and by its one URI name, wrenn://host/{uuid} or
// wrenn://server. A host's leaf therefore opens no other host.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
)

// How long certificates hold.
const (
	AuthorityLasts = 10 * 365 * 24 * time.Hour
	HostLasts      = 7 * 24 * time.Hour
	ServerLasts    = 24 * time.Hour
	// ServerSwaps is how often the control plane's certificate is replaced.
	ServerSwaps = 12 * time.Hour
)

// skew is how far the clocks of two machines may be apart.
const skew = 5 * time.Minute

const (
	blockCert = "CERTIFICATE"
	blockKey  = "PRIVATE KEY"
	blockCSR  = "CERTIFICATE REQUEST"
)

// Authority signs the leaves of one installation.
type Authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	pool *x509.CertPool
}

// NewAuthority makes an authority.
func NewAuthority() (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of authority: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:   pkix.Name{Organization: []string{"Wrenn"}, CommonName: "Wrenn authority"},
		NotBefore: now.Add(-skew), NotAfter: now.Add(AuthorityLasts),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	if template.SerialNumber, err = serial(); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read back authority: %w", err)
	}
	return newAuthority(cert, key), nil
}

func newAuthority(cert *x509.Certificate, key crypto.Signer) *Authority {
	a := &Authority{cert: cert, key: key, pool: x509.NewCertPool()}
	a.pool.AddCert(cert)
	return a
}

// LoadAuthority reads an authority's certificate and private key, both PEM.
// It refuses a key that others than its owner may read.
func LoadAuthority(certFile, keyFile string) (*Authority, error) {
	info, err := os.Stat(keyFile)
	if err != nil {
		return nil, fmt.Errorf("read key of authority: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("read key of authority: %s has mode %#o; others than its owner must not read it (chmod 600)", keyFile, mode)
	}
	keyPEM, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, fmt.Errorf("read key of authority: %w", err)
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("read key of authority: %w", err)
	}
	certPEM, err := os.ReadFile(certFile)
	if err != nil {
		return nil, fmt.Errorf("read certificate of authority: %w", err)
	}
	cert, err := ParseCertificate(certPEM)
	if err != nil {
		return nil, fmt.Errorf("read certificate of authority: %w", err)
	}
	if public, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key.Public()) {
		return nil, errors.New("read authority: the certificate is not the key's")
	}
	now := time.Now()
	switch {
	case !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, errors.New("read certificate of authority: it may not sign others")
	case now.Before(cert.NotBefore) || now.After(cert.NotAfter):
		return nil, fmt.Errorf("read certificate of authority: it holds from %v to %v", cert.NotBefore, cert.NotAfter)
	}
	return newAuthority(cert, key), nil
}

// Save writes an authority's certificate and private key, PEM, to two new
// files of mode 0600. It overwrites nothing.
func (a *Authority) Save(certFile, keyFile string) error {
	key, err := EncodeKey(a.key)
	if err != nil {
		return err
	}
	if err := create(keyFile, key); err != nil {
		return fmt.Errorf("write key of authority: %w", err)
	}
	if err := create(certFile, a.PEM()); err != nil {
		return errors.Join(fmt.Errorf("write certificate of authority: %w", err), os.Remove(keyFile))
	}
	return nil
}

// create writes a new file, durably.
func create(path string, content []byte) error {
	err := atomicfile.Create(path, content, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s exists already", path)
	}
	return err
}

// PEM is the authority's certificate, without its key.
func (a *Authority) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: blockCert, Bytes: a.cert.Raw})
}

// Pool has the authority alone.
func (a *Authority) Pool() *x509.CertPool { return a.pool }

// sign makes a leaf for a public key, valid from now on for as long as said,
// but never longer than the authority itself.
func (a *Authority) sign(leaf *x509.Certificate, public any, lasts time.Duration) (*x509.Certificate, error) {
	var err error
	if leaf.SerialNumber, err = serial(); err != nil {
		return nil, err
	}
	now := time.Now()
	leaf.NotBefore, leaf.NotAfter = now.Add(-skew), now.Add(lasts)
	if leaf.NotAfter.After(a.cert.NotAfter) {
		leaf.NotAfter = a.cert.NotAfter
	}
	leaf.KeyUsage, leaf.BasicConstraintsValid = x509.KeyUsageDigitalSignature, true
	der, err := x509.CreateCertificate(rand.Reader, leaf, a.cert, public, a.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

// SignHost signs a host's certificate signing request (PEM). The names that it
// asks for must be the address at which the control plane will call the host,
// an IP address or a DNS name, and nothing else. It returns the leaf as PEM,
// and parsed.
func (a *Authority) SignHost(csrPEM []byte, host uuid.UUID, address string) ([]byte, *x509.Certificate, error) {
	block, rest := pem.Decode(csrPEM)
	if block == nil || block.Type != blockCSR || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, nil, errors.New("read signing request: not one PEM block of that kind")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("read signing request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, nil, fmt.Errorf("check signing request: %w", err)
	}
	public, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, nil, errors.New("check signing request: want an ECDSA key on P-256")
	}
	ips, names := split(address)
	if !slices.EqualFunc(csr.IPAddresses, ips, net.IP.Equal) || !slices.Equal(csr.DNSNames, names) || len(csr.EmailAddresses) > 0 || len(csr.URIs) > 0 {
		return nil, nil, fmt.Errorf("check signing request: its names must be the host's address %s and no other", address)
	}
	cert, err := a.sign(&x509.Certificate{
		Subject:     pkix.Name{CommonName: "Wrenn host " + host.String()},
		IPAddresses: ips, DNSNames: names, URIs: []*url.URL{HostName(host)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, public, HostLasts)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: blockCert, Bytes: cert.Raw}), cert, nil
}

// HostName is the URI name in a host's leaf.
func HostName(host uuid.UUID) *url.URL {
	return &url.URL{Scheme: "wrenn", Host: "host", Path: "/" + host.String()}
}

// serverName is the URI name in the control plane's leaf.
func serverName() *url.URL { return &url.URL{Scheme: "wrenn", Host: "server"} }

// NewRequest makes a signing request (PEM) for a key and the address at which
// the control plane will call the host.
func NewRequest(key crypto.Signer, address string) ([]byte, error) {
	ips, names := split(address)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{IPAddresses: ips, DNSNames: names}, key)
	if err != nil {
		return nil, fmt.Errorf("make signing request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: blockCSR, Bytes: der}), nil
}

// split says whether an address is an IP address or a name.
func split(address string) ([]net.IP, []string) {
	if ip := net.ParseIP(address); ip != nil {
		return []net.IP{ip}, nil
	}
	return nil, []string{address}
}

// NewKey makes a private key.
func NewKey() (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make private key: %w", err)
	}
	return key, nil
}

// EncodeKey writes a private key as PEM (PKCS #8).
func EncodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode private key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: blockKey, Bytes: der}), nil
}

func parseKey(text []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != blockKey {
		// Not with what was read: it may be a key of another form.
		return nil, errors.New("not a PEM file with a PRIVATE KEY (PKCS #8)")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, errors.New("want an ECDSA key on P-256")
	}
	return ec, nil
}

// ParseCertificate reads a file with one certificate (PEM).
func ParseCertificate(text []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(text)
	if block == nil || block.Type != blockCert || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, errors.New("not one PEM certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}

// Serial is a certificate's serial number in hexadecimal.
func Serial(cert *x509.Certificate) string { return cert.SerialNumber.Text(16) }

// serial makes a serial number: 127 random bits, as RFC 5280 bounds it.
func serial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}
