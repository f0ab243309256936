package sandbox

import (
	"context"
	"errors"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/wrenn-dev/wrenn/internal/backoff"
)

// A port on which nothing listens is tried again for a while: a server may have
// just been started, by a command or by a resume. Programs that listen on the
// guest's loopback alone are reachable up to a second later.
const (
	listenWait     = 5 * time.Second
	firstRedial    = 10 * time.Millisecond
	longestRedial  = 250 * time.Millisecond
	connectTimeout = 10 * time.Second
)

// portTransport carries requests to the ports of the guest at host. Connecting
// ends with life, because the address may be another sandbox's soon after; a
// request that is given up alone does not end it.
func portTransport(life context.Context, d *net.Dialer, host string) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			defer context.AfterFunc(life, cancel)()
			return dialPort(ctx, d, net.JoinHostPort(host, port))
		},
		DisableCompression:     true,
		MaxIdleConns:           512,
		MaxIdleConnsPerHost:    256,
		IdleConnTimeout:        60 * time.Second,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: 1 << 20,
	}
}

// dialPort connects to a guest's port, and waits a short while for a server
// that does not listen yet. No byte of a request is sent before it returns.
func dialPort(ctx context.Context, d *net.Dialer, address string) (net.Conn, error) {
	deadline := time.Now().Add(listenWait)
	pauses := backoff.New(firstRedial, longestRedial)
	for {
		conn, err := d.DialContext(ctx, "tcp", address)
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Now().Add(longestRedial).After(deadline) || pauses.Wait(ctx) != nil {
			return conn, err
		}
	}
}
