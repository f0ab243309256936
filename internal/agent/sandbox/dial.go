package sandbox

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"
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

// dialPort connects to a guest's port, and waits a short while for a server
// that does not listen yet. No byte of a request is sent before it returns.
func dialPort(ctx context.Context, d *net.Dialer, address string) (net.Conn, error) {
	deadline := time.Now().Add(listenWait)
	for pause := firstRedial; ; pause = min(2*pause, longestRedial) {
		conn, err := d.DialContext(ctx, "tcp", address)
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Now().Add(pause).After(deadline) {
			return conn, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, err
		}
	}
}
