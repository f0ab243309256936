// Package pki manages the certificates with which the control plane and hosts' agents
// authenticate each other: an authority for the installation, leaves for hosts, and the
// control plane's client certificate. All keys are ECDSA P-256, and all connections are
// TLS 1.3.
//
// Two fields of a leaf say what it is for: its extended key usage (server for a host,
// client for the control plane), and its only URI name, wrenn://host/{uuid} or
// wrenn://server. So a host cannot use its leaf to call another host.
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

// How long certificates are valid.
const (
	AuthorityLasts = 10 * 365 * 24 * time.Hour
	HostLasts      = 7 * 24 * time.Hour
	ServerLasts    = 24 * time.Hour
	// ServerSwaps is how often the control plane's certificate is replaced.
	ServerSwaps = 12 * time.Hour
)

// skew is the largest difference between the clocks of two machines.
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

// NewAuthority creates an authority.
func NewAuthority() (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("create authority's key: %w", err)
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

// LoadAuthority reads an authority's certificate and private key (PEM). It refuses a key
// that anybody except its owner may read.
func LoadAuthority(certFile, keyFile string) (*Authority, error) {
	info, err := os.Stat(keyFile)
	if err != nil {
		return nil, fmt.Errorf("read key of authority: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("read key of authority: %s has mode %#o; only its owner may read it (chmod 600)", keyFile, mode)
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
		return nil, errors.New("read authority: certificate and key do not match")
	}
	now := time.Now()
	switch {
	case !cert.IsCA || cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, errors.New("read certificate of authority: it may not sign certificates")
	case now.Before(cert.NotBefore) || now.After(cert.NotAfter):
		return nil, fmt.Errorf("read certificate of authority: it is only valid from %v to %v", cert.NotBefore, cert.NotAfter)
	}
	return newAuthority(cert, key), nil
}

// Save writes an authority's certificate and private key (PEM) to two new files with
// mode 0600. It overwrites nothing.
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
		return fmt.Errorf("%s already exists", path)
	}
	return err
}

// PEM returns the authority's certificate, without its key.
func (a *Authority) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: blockCert, Bytes: a.cert.Raw})
}

// Pool returns a pool with only this authority.
func (a *Authority) Pool() *x509.CertPool { return a.pool }

// sign signs a leaf for a public key. It is valid from now on for the given time, but
// not longer than the authority.
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

// SignHost signs a host's certificate signing request (PEM). The request must name
// exactly the address, an IP address or a DNS name, at which the control plane will call
// the host. SignHost returns the leaf as PEM and parsed.
func (a *Authority) SignHost(csrPEM []byte, host uuid.UUID, address string) ([]byte, *x509.Certificate, error) {
	block, rest := pem.Decode(csrPEM)
	if block == nil || block.Type != blockCSR || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, nil, errors.New("read signing request: want exactly one PEM block with a certificate request")
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
		return nil, nil, fmt.Errorf("check signing request: it must name the host's address %s and nothing else", address)
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

// NewRequest creates a certificate signing request (PEM) for a key and the address at
// which the control plane will call the host.
func NewRequest(key crypto.Signer, address string) ([]byte, error) {
	ips, names := split(address)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{IPAddresses: ips, DNSNames: names}, key)
	if err != nil {
		return nil, fmt.Errorf("create signing request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: blockCSR, Bytes: der}), nil
}

// split returns an address as an IP address or as a DNS name.
func split(address string) ([]net.IP, []string) {
	if ip := net.ParseIP(address); ip != nil {
		return []net.IP{ip}, nil
	}
	return nil, []string{address}
}

// NewKey creates a private key.
func NewKey() (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("create private key: %w", err)
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
		// The error must not quote the text, which may be a key in another form.
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

// ParseCertificate parses text with exactly one certificate (PEM).
func ParseCertificate(text []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(text)
	if block == nil || block.Type != blockCert || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, errors.New("want exactly one PEM certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}

// Serial returns a certificate's serial number in hexadecimal.
func Serial(cert *x509.Certificate) string { return cert.SerialNumber.Text(16) }

// serial returns a random serial number of 127 bits, within the limit of RFC 5280.
func serial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("create serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}
