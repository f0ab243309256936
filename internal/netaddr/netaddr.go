// Package netaddr lets Wrenn's programs listen on, and connect to, "host:port" and
// "unix:/path", over HTTP/1.1 or HTTP/2 (which Connect's bidirectional streams need),
// with or without TLS. It also classifies IP addresses.
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

// Split returns the network and the address of addr: ("unix", path) for "unix:/path",
// otherwise ("tcp", addr) without a leading "http://" or "https://".
func Split(addr string) (network, address string) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		return "unix", path
	}
	addr = strings.TrimPrefix(strings.TrimPrefix(addr, "http://"), "https://")
	return "tcp", strings.TrimSuffix(addr, "/")
}

// Local reports whether only this machine can reach addr: a Unix socket, or a loopback
// address.
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

// loopback reports whether host is localhost or a loopback address.
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

// LoopbackName reports whether browsers resolve the Host of a request to their own
// machine without DNS: a loopback address, localhost, or a name below it.
func LoopbackName(host string) bool {
	name := Hostname(host)
	return loopback(name) || strings.HasSuffix(name, ".localhost")
}

// Listen listens on addr. A Unix socket gets the given mode, and replaces one that an
// earlier process left. If a process listens on it, Listen fails. Closed connections
// linger (see package linger).
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
		return nil, fmt.Errorf("listen on %s: the path of a Unix socket can have at most %d bytes; choose a shorter directory", address, maxUnixPath)
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
		return fmt.Errorf("listen on %s: the file exists and is not a socket", path)
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

// Transport returns a transport that connects to addr, whatever host a request names. It
// speaks HTTP/2 without TLS if h2c is set, otherwise HTTP/1.1.
func Transport(addr string, h2c bool) *http.Transport {
	var p http.Protocols
	if h2c {
		p.SetUnencryptedHTTP2(true)
	} else {
		p.SetHTTP1(true)
	}
	return transport(addr, &p)
}

// TLSTransport is like Transport, over TLS. It speaks HTTP/2 if h2 is set, otherwise
// HTTP/1.1.
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
		MaxIdleConnsPerHost: 512, // so that many concurrent requests keep their connections
		IdleConnTimeout:     90 * time.Second,
		HTTP2:               &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second, MaxReceiveBufferPerStream: Window},
	}
}

// HTTPClient returns an HTTP/2 client, without TLS, for the server at addr, and the base
// URL for its requests.
func HTTPClient(addr string) (client *http.Client, baseURL string) {
	network, address := Split(addr)
	if network == "unix" {
		address = "localhost"
	}
	return &http.Client{Transport: Transport(addr, true)}, "http://" + address
}

// Window is how many bytes of a body over HTTP/2 wait in memory until they are read. It
// is the least that a server can set, because clients assume it at first.
const Window = 64 << 10

// Server returns a server for handler that speaks HTTP/1.1 and HTTP/2, with or without
// TLS. Headers have a time limit. Bodies have those of [patience], which a handler
// changes for streams.
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

// Separate makes requests on one HTTP/2 connection of s independent. Without it, a
// request whose body nobody reads, such as a command's input, blocks the others.
func Separate(s *http.Server) {
	// Go's client assumes this limit at first. For more streams it opens more connections.
	const streams = 100
	// One window per stream. This exceeds the documented range of http.HTTP2Config, but Go
	// accepts it (TestUnreadBodies).
	s.HTTP2.MaxConcurrentStreams, s.HTTP2.MaxReceiveBufferPerConnection = streams, streams*Window
}
