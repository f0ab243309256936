// Package netaddr lets Wrenn's programs listen on and call one another at
// "host:port" or "unix:/path" alike, over HTTP/1.1 or HTTP/2 (which Connect's
// bidirectional streams need), in clear or over TLS.
package netaddr

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/wrenn-dev/wrenn/internal/linger"
	"github.com/wrenn-dev/wrenn/internal/patience"
)

// maxUnixPath is the longest path that fits in Linux's sockaddr_un, less its NUL.
const maxUnixPath = 107

// Split returns the network and the address that addr names: ("unix", path)
// for "unix:/path", else ("tcp", addr) with an "http://" or "https://" before
// it removed.
func Split(addr string) (network, address string) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		return "unix", path
	}
	addr = strings.TrimPrefix(strings.TrimPrefix(addr, "http://"), "https://")
	return "tcp", strings.TrimSuffix(addr, "/")
}

// Local says whether only this machine can reach addr: a unix socket, or an
// address of the loopback interface.
func Local(addr string) bool {
	network, address := Split(addr)
	if network == "unix" {
		return true
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	return loopback(host)
}

// loopback says whether host is localhost or an address of the loopback interface.
func loopback(host string) bool {
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}

// Hostname returns the name or address in a request's Host without the port, brackets
// and a final dot, in lower case, so that callers can compare it.
func Hostname(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// LoopbackName reports whether browsers take the Host of a request for their own
// machine, whatever DNS says: a loopback address, localhost, or a name below it.
func LoopbackName(host string) bool {
	name := Hostname(host)
	return loopback(name) || strings.HasSuffix(name, ".localhost")
}

// Listen listens on addr. A unix socket gets the given mode; one that an
// earlier process left behind is replaced, one that somebody listens on is an
// error. Connections linger when they are closed, as package linger says.
func Listen(ctx context.Context, addr string, mode fs.FileMode) (net.Listener, error) {
	network, address := Split(addr)
	var lc net.ListenConfig
	if network != "unix" {
		l, err := lc.Listen(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return linger.Listener(l), nil
	}
	if len(address) > maxUnixPath {
		return nil, fmt.Errorf("listen on %s: path is longer than the %d bytes a unix socket may have; choose a shorter directory", address, maxUnixPath)
	}
	if err := removeStale(ctx, address); err != nil {
		return nil, err
	}
	l, err := lc.Listen(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(address, mode); err != nil {
		l.Close()
		return nil, fmt.Errorf("set mode of socket: %w", err)
	}
	return linger.Listener(l), nil
}

// removeStale removes the socket at path if nobody listens on it.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at socket: %w", err)
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("listen on %s: a file that is no socket is there", path)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		conn.Close()
		return fmt.Errorf("listen on %s: %w", path, syscall.EADDRINUSE)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	return os.Remove(path)
}

// Transport returns a transport whose every connection goes to addr, whatever
// host a request names. With h2c it speaks cleartext HTTP/2, else HTTP/1.1.
func Transport(addr string, h2c bool) *http.Transport {
	var p http.Protocols
	if h2c {
		p.SetUnencryptedHTTP2(true)
	} else {
		p.SetHTTP1(true)
	}
	return transport(addr, &p)
}

// TLSTransport is Transport over TLS: with h2 it speaks HTTP/2, else HTTP/1.1.
func TLSTransport(addr string, h2 bool, c *tls.Config) *http.Transport {
	var p http.Protocols
	if h2 {
		p.SetHTTP2(true)
	} else {
		p.SetHTTP1(true)
	}
	t := transport(addr, &p)
	t.TLSClientConfig = c
	return t
}

func transport(addr string, p *http.Protocols) *http.Transport {
	network, address := Split(addr)
	d := net.Dialer{Timeout: 10 * time.Second}
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, network, address)
		},
		TLSHandshakeTimeout: 10 * time.Second,
		Protocols:           p,
		MaxIdleConnsPerHost: 512, // as many clients at once keep their connections
		IdleConnTimeout:     90 * time.Second,
		HTTP2:               &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second, MaxReceiveBufferPerStream: Window},
	}
}

// HTTPClient returns a cleartext HTTP/2 client for the server at addr and the
// base URL to put before paths.
func HTTPClient(addr string) (client *http.Client, baseURL string) {
	network, address := Split(addr)
	if network == "unix" {
		address = "localhost"
	}
	return &http.Client{Transport: Transport(addr, true)}, "http://" + address
}

// Window is how much of a body over HTTP/2 waits in memory until it is read, in bytes.
// It is the least that a server can set: clients assume it until they hear of another.
const Window = 64 << 10

// Server returns a server for handler that speaks HTTP/1.1 and HTTP/2, in
// clear or over TLS. Headers have a time limit, and bodies that of [patience],
// which a handler changes for streams.
func Server(handler http.Handler) *http.Server {
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	p.SetHTTP2(true)
	return &http.Server{
		Handler:           patience.Handler(handler, patience.Default),
		Protocols:         &p,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		HTTP2:             &http.HTTP2Config{MaxReceiveBufferPerStream: Window},
	}
}

// Separate makes the requests of one HTTP/2 connection of s independent: one whose body
// nobody reads, such as the input of a command that reads none, stops no other.
func Separate(s *http.Server) {
	// As many as Go's client sends before it hears of a bound. For more it opens another
	// connection.
	const streams = 100
	// A window for each. It is more than http.HTTP2Config promises to take, and less
	// than Go takes: TestUnreadBodies shows it.
	s.HTTP2.MaxConcurrentStreams, s.HTTP2.MaxReceiveBufferPerConnection = streams, streams*Window
}
