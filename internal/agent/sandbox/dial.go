package sandbox

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// The agent retries connections to a port on which nothing listens for a while, because a
// command or a resume may have just started the server.
const (
	listenWait     = 5 * time.Second
	firstRedial    = 10 * time.Millisecond
	longestRedial  = 250 * time.Millisecond
	connectTimeout = 10 * time.Second
	// idleTimeout is the time after which an idle connection to a guest is closed.
	idleTimeout = 60 * time.Second
	// onceIdle is shorter than the time for which servers keep idle connections (2 s or more).
	onceIdle = time.Second
	// maxHeader bounds the header of a guest's response.
	maxHeader = 1 << 20
)

// ports sends requests to the ports of a guest.
type ports struct {
	http1 *upstream.Transport
	// http2 speaks HTTP/2 with prior knowledge, without TLS.
	http2 *http.Transport
	// only2 has the addresses whose servers do not speak HTTP/1.1.
	only2 sync.Map
}

// newPorts makes the ports of the guest at host. Attempts to connect end with life, because
// another sandbox may get the address soon after. knock makes the guest daemon look for new
// servers on the guest's loopback, which makes them reachable. newPorts calls suspect when
// the guest may be silent.
func newPorts(life context.Context, d *net.Dialer, host string, knock func(context.Context), suspect func()) *ports {
	knocking := make(chan struct{}, 1)
	once := func(ctx context.Context) {
		select {
		case knocking <- struct{}{}:
		default:
			return // Another request's connection was refused just now.
		}
		defer func() { <-knocking }()
		knock(ctx)
	}
	dial := func(ctx context.Context, addr string) (net.Conn, error) {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(life, cancel)()
		conn, err := dialPort(ctx, d, net.JoinHostPort(host, port), once)
		if err != nil && ctx.Err() == nil && !errors.Is(err, syscall.ECONNREFUSED) {
			suspect()
		}
		return conn, err
	}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	return &ports{
		http1: &upstream.Transport{
			Dial: dial, Redial: redial, IdleTimeout: idleTimeout, OnceIdle: onceIdle, MaxIdle: 512, MaxIdlePerHost: 256, MaxHeaderBytes: maxHeader,
		},
		http2: &http.Transport{
			DialContext:        func(ctx context.Context, _, addr string) (net.Conn, error) { return dial(ctx, addr) },
			Protocols:          &protocols,
			DisableCompression: true, IdleConnTimeout: idleTimeout, MaxIdleConnsPerHost: 256, MaxResponseHeaderBytes: maxHeader,
			HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: netaddr.Window},
		},
	}
}

// RoundTrip implements [http.RoundTripper].
func (p *ports) RoundTrip(req *http.Request) (*http.Response, error) {
	_, only2 := p.only2.Load(req.URL.Host)
	if !only2 && !isGRPC(req) {
		resp, err := p.http1.RoundTrip(req)
		if !errors.Is(err, upstream.ErrHTTP2) {
			return resp, err
		}
		p.only2.Store(req.URL.Host, nil)
		if req.Body != nil && req.Body != http.NoBody {
			return nil, err // cannot repeat it, because its body was read
		}
	}
	resp, err := p.http2.RoundTrip(req)
	if err != nil {
		p.only2.Delete(req.URL.Host)
	}
	return resp, err
}

// isGRPC reports whether a request is gRPC, which needs HTTP/2.
func isGRPC(req *http.Request) bool {
	kind, _, _ := strings.Cut(req.Header.Get("Content-Type"), ";")
	kind, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(kind)), "application/grpc")
	return ok && (kind == "" || kind[0] == '+') // Not grpc-web.
}

// close closes idle connections. There must be no new requests.
func (p *ports) close() {
	p.http1.Close()
	p.http2.CloseIdleConnections()
}

// dialPort connects to a guest's port, and retries for a while if no server listens yet. It
// calls knock whenever a connection is refused.
func dialPort(ctx context.Context, d *net.Dialer, address string, knock func(context.Context)) (net.Conn, error) {
	wait := redial()
	for {
		conn, err := d.DialContext(ctx, "tcp", address)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return conn, err
		}
		knock(ctx)
		if !wait(ctx) {
			return conn, err
		}
	}
}

// redial returns a function that waits before the next attempt to connect. The function
// returns false if there should be no further attempt.
func redial() func(context.Context) bool {
	deadline := time.Now().Add(listenWait)
	pauses := backoff.New(firstRedial, longestRedial)
	return func(ctx context.Context) bool {
		return time.Now().Add(longestRedial).Before(deadline) && pauses.Wait(ctx) == nil
	}
}
