package ports

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/wrenn-dev/wrenn/internal/redial"
)

const (
	// maxOpen bounds the connections that one bridge holds open. Further ones wait in the
	// kernel until it accepts them.
	maxOpen = 4096
	// maxDials bounds those of them that wait for the service to accept.
	maxDials = 64
	// acceptPause is how long a bridge waits if it has no descriptor for a connection.
	acceptPause = 100 * time.Millisecond
	// The service is on this machine, and answers soon unless its backlog is full.
	firstAttempt, longestAttempt = 250 * time.Millisecond, time.Second
)

// keepAlive finds out that the other end of an idle connection is gone, as it is after a
// resume.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

// bridge carries connections from the guest's address to a socket on its loopback.
type bridge struct {
	listener *net.TCPListener
	target   string
	dialer   redial.Dialer
	log      *slog.Logger
	stop     chan struct{} // closed by Stop
	done     chan struct{} // closed when it has stopped listening
}

// newBridge starts a bridge from address, at target's port, to target. It is listening
// when newBridge returns.
func newBridge(address netip.Addr, target netip.AddrPort, log *slog.Logger) (*bridge, error) {
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(address, target.Port())))
	if err != nil {
		return nil, err
	}
	places := make(chan struct{}, maxDials)
	b := &bridge{listener: l, target: target.String(), log: log, stop: make(chan struct{}), done: make(chan struct{})}
	b.dialer = redial.Dialer{
		Net: &net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: false}, KeepAlive: -1}, First: firstAttempt, Longest: longestAttempt,
		Enter: func(ctx context.Context, _ string) (func(), error) {
			select {
			case places <- struct{}{}:
				return func() { <-places }, nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		},
	}
	go b.run()
	return b, nil
}

// Stop stops accepting connections, and leaves open ones alone. The port is free when it
// returns. Call it once.
func (b *bridge) Stop() {
	close(b.stop)
	_ = b.listener.Close()
	<-b.done
}

func (b *bridge) run() {
	defer close(b.done)
	room := make(chan struct{}, maxOpen)
	for {
		select {
		case room <- struct{}{}:
		case <-b.stop:
			return
		}
		c, err := b.listener.AcceptTCP()
		if err == nil {
			go func() {
				defer func() { <-room }()
				b.carry(c)
			}()
			continue
		}
		<-room
		if errors.Is(err, net.ErrClosed) {
			return
		}
		b.log.Warn("bridge port: accept", "target", b.target, "error", err)
		select {
		case <-time.After(acceptPause):
		case <-b.stop:
			return
		}
	}
}

// carry connects to the service and copies in both directions, including half-closes and
// resets.
func (b *bridge) carry(in *net.TCPConn) {
	defer in.Close()
	_ = in.SetKeepAliveConfig(keepAlive)
	conn, err := b.dialer.Dial(context.Background(), b.target)
	if err != nil {
		b.log.Warn("bridge port: connect", "target", b.target, "error", err)
		_ = in.SetLinger(0) // A reset cannot be taken for a response.
		return
	}
	out := conn.(*net.TCPConn)
	defer out.Close()
	pass := func(to, from *net.TCPConn) {
		if _, err := io.Copy(to, from); err != nil {
			// A reset of one end becomes one of the other, or half a response might look whole.
			for _, c := range []*net.TCPConn{in, out} {
				_ = c.SetLinger(0)
				_ = c.Close()
			}
			return
		}
		_ = to.CloseWrite()
	}
	var back sync.WaitGroup
	back.Go(func() { pass(in, out) })
	pass(out, in)
	back.Wait()
}
