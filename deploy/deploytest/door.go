package deploytest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/deploy"
	"github.com/wrenn-dev/wrenn/internal/await"
)

// Door is Caddy with the shipped Caddyfile, on a free port of 127.0.0.1, for one test.
type Door struct {
	// Address is the host and port it listens on, Port the port alone.
	Address, Port string
	// Trust verifies the certificate that ServeTLS made; nil before.
	Trust *x509.CertPool

	socket *os.File
}

// Listen opens the socket of a front door, so that nobody else takes the port
// before it serves.
func Listen(t testing.TB) *Door {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &Door{Address: l.Addr().String()}
	_, d.Port, _ = net.SplitHostPort(d.Address)
	if d.socket, err = l.(*net.TCPListener).File(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.socket.Close() })
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return d
}

// Serve runs Caddy over plain HTTP until the test ends. server is the control plane's
// address in the form of WRENN_SERVER, and env adds to Caddy's environment.
func (d *Door) Serve(t testing.TB, server string, env ...string) {
	t.Helper()
	d.run(t, t.TempDir(), append(env, "WRENN_SITES=http://:"+d.Port, "WRENN_SERVER="+server))
}

// ServeTLS is like Serve, but over HTTPS, configured as in the README's "Add a machine":
// with a self-signed certificate for names.
func (d *Door) ServeTLS(t testing.TB, server string, names []string, env ...string) {
	t.Helper()
	dir := t.TempDir()
	cert, err := certify(dir, names)
	if err != nil {
		t.Fatal(err)
	}
	d.Trust = x509.NewCertPool()
	d.Trust.AddCert(cert)
	sites := make([]string, len(names))
	for i, name := range names {
		sites[i] = "https://" + name + ":" + d.Port
	}
	d.run(t, dir, append(env, "WRENN_SITES="+strings.Join(sites, ", "), "WRENN_SERVER="+server,
		"CREDENTIALS_DIRECTORY="+dir, "WRENN_TLS=tls {env.CREDENTIALS_DIRECTORY}/tls.crt {env.CREDENTIALS_DIRECTORY}/tls.key"))
}

func (d *Door) run(t testing.TB, dir string, env []string) {
	t.Helper()
	bin, err := caddy()
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(config, deploy.Caddyfile, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "caddy"), "run", "--config", config, "--adapter", "caddyfile")
	cmd.Env = append([]string{"HOME=" + dir, "WRENN_BIND=fd/3"}, env...)
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	cmd.ExtraFiles = []*os.File{d.socket}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	// The socket is open before Caddy is, so only an answer shows that Caddy serves.
	request, err := http.NewRequestWithContext(ctx, http.MethodHead, "http://"+d.Address+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DisableKeepAlives: true, ResponseHeaderTimeout: await.Hang}
	answered := make(chan error, 1)
	go func() {
		// To plain HTTP at its HTTPS port, Caddy answers 400.
		resp, err := transport.RoundTrip(request)
		if err == nil {
			err = resp.Body.Close()
		}
		answered <- err
	}()
	select {
	case err := <-answered:
		if err != nil {
			t.Fatalf("Caddy does not answer: %v", err)
		}
	case err := <-ended:
		ended <- err
		t.Fatalf("Caddy ended: %v", err)
	}
}

// certify makes a self-signed certificate for the given DNS names. It writes the
// certificate to tls.crt in dir and the private key to tls.key.
func certify(dir string, names []string) (*x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: names,
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	for name, block := range map[string]*pem.Block{"tls.crt": {Type: "CERTIFICATE", Bytes: der}, "tls.key": {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			return nil, err
		}
	}
	return x509.ParseCertificate(der)
}
