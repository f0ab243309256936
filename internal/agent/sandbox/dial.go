package sandbox

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/redial"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

const (
	// firstAttempt and longestAttempt bound an attempt to connect: the first one, and the
	// later ones. A guest on a busy host may take a second or two to answer.
	firstAttempt   = 250 * time.Millisecond
	longestAttempt = 4 * time.Second
	// lateAfter is how long a guest may take to answer before the agent checks whether it
	// responds at all.
	lateAfter = 10 * time.Second
	// maxDials bounds the connections to a guest that are being made at a time, and
	// maxDialsPerPort those to one port, so that no port uses up what others need.
	maxDials        = 1024
	maxDialsPerPort = 64
	// maxKnocks bounds the ports for which the agent asks the guest daemon at a time.
	maxKnocks = 64
	// dialGap is the time between the starts of two connections to a port. A guest's kernel
	// may acknowledge more connections at once than fit into the backlog, and drop the
	// others seconds later, when their requests have been sent.
	dialGap = 20 * time.Millisecond
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

// portsGuest is the guest whose ports [ports] reaches.
type portsGuest struct {
	host string
	// knock asks the guest daemon to make a port reachable whose server listens on the
	// guest's loopback. It may wait for a server, and returns whether there is one.
	knock func(ctx context.Context, port uint16) bool
	// suspect starts a check whether the guest responds, and silent reports whether it is
	// known not to. Both are called when a connection has taken longer than late.
	suspect func()
	silent  func() bool
	late    time.Duration
}

// newPorts makes the ports of a guest. Connecting ends with life, because the address may
// be another sandbox's soon after; a request that is given up alone does not end it.
func newPorts(life context.Context, d *net.Dialer, g portsGuest) *ports {
	knocks, places := singleflight.Group{}, make(chan struct{}, maxKnocks)
	knock := func(ctx context.Context, port string) bool {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return false
		}
		select {
		case places <- struct{}{}:
			defer func() { <-places }()
			return g.knock(ctx, uint16(n))
		default:
			return false
		}
	}
	turns := newTurns(maxDials, maxDialsPerPort, dialGap)
	dial := func(ctx context.Context, addr string) (net.Conn, error) {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(life, cancel)()
		suspected := false
		dialer := redial.Dialer{
			Net: d, First: firstAttempt, Longest: longestAttempt, Enter: turns.enter,
			Refused: func(ctx context.Context) bool {
				now, _, _ := knocks.Do(port, func() (any, error) { return knock(ctx, port), nil })
				return now.(bool)
			},
			Late: func(since time.Duration) bool {
				if since < g.late {
					return false
				}
				if !suspected {
					g.suspect()
					suspected = true
				}
				return g.silent()
			},
		}
		conn, err := dialer.Dial(ctx, net.JoinHostPort(g.host, port))
		if err != nil && ctx.Err() == nil && !errors.Is(err, syscall.ECONNREFUSED) {
			g.suspect()
		}
		return conn, err
	}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	return &ports{
		http1: &upstream.Transport{
			Dial: dial, Redial: redial.Pauses, IdleTimeout: idleTimeout, OnceIdle: onceIdle, MaxIdle: 512, MaxIdlePerHost: 256, MaxHeaderBytes: maxHeader,
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
