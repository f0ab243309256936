// Package redial connects over TCP to servers that are busy or not there yet.
package redial

import (
	"context"
	"errors"
	"net"
	"syscall"
	"time"

	"github.com/wrenn-dev/wrenn/internal/backoff"
)

const (
	// limit bounds a whole Dial: Linux gives up after about as long by itself.
	limit = 2 * time.Minute
	// ListenWait is how long to wait for a server that does not listen: it may have just
	// been started, by a command or by a resume.
	ListenWait = 5 * time.Second
	// firstPause and longestPause bound the pauses between refused attempts.
	firstPause   = 10 * time.Millisecond
	longestPause = 250 * time.Millisecond
)

// Dialer makes connections that a full backlog delays but does not lose. A kernel whose
// backlog is full drops the packet that asks for a connection, and the dialling kernel
// repeats it at ever longer intervals. The dialer abandons such an attempt and makes a new
// one, so that no Dial has two under way.
type Dialer struct {
	// Net makes the attempts.
	Net *net.Dialer
	// First and Longest are the time limits of the first attempt and of the longest ones.
	// Each limit is about twice the one before.
	First, Longest time.Duration
	// Enter, if not nil, is called before each attempt and may wait. leave is called after it.
	Enter func(ctx context.Context, address string) (leave func(), err error)
	// Refused, if not nil, is called when nothing listens, and may wait for a server. If it
	// returns true, the next attempt follows at once.
	Refused func(context.Context) (now bool)
	// Late, if not nil, is called after an attempt without an answer, with the time since
	// Dial began. If it returns true, Dial returns.
	Late func(since time.Duration) (stop bool)
}

// Dial connects to address ("host:port"). It gives up after two minutes, or when nothing
// has listened for [ListenWait].
func (d *Dialer) Dial(ctx context.Context, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	begun := time.Now()
	var pause func(context.Context) bool
	hurried := false
	for {
		conn, waited, err := d.attempts(ctx, address, begun)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return conn, err
		}
		if pause == nil || waited {
			pause = Pauses()
		}
		// Whatever Refused says, every second attempt follows a pause.
		hurried = !hurried && d.Refused != nil && d.Refused(ctx)
		if !hurried && !pause(ctx) {
			return nil, err
		}
	}
}

// attempts dials until an attempt does not time out. waited is set if one did.
func (d *Dialer) attempts(ctx context.Context, address string, begun time.Time) (conn net.Conn, waited bool, err error) {
	lengths := backoff.New(d.First, d.Longest)
	for {
		conn, err = d.attempt(ctx, address, lengths.Next())
		var late net.Error
		if err == nil || ctx.Err() != nil || !errors.As(err, &late) || !late.Timeout() {
			return conn, waited, err
		}
		waited = true
		if d.Late != nil && d.Late(time.Since(begun)) {
			return nil, waited, err
		}
	}
}

func (d *Dialer) attempt(ctx context.Context, address string, length time.Duration) (net.Conn, error) {
	if d.Enter != nil {
		leave, err := d.Enter(ctx, address)
		if err != nil {
			return nil, err
		}
		defer leave()
	}
	ctx, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	return d.Net.DialContext(ctx, "tcp", address)
}

// Pauses returns a function that waits before the next attempt to reach a server that
// does not listen. It returns false if there should be none: [ListenWait] is over, or the
// context.
func Pauses() (wait func(context.Context) bool) {
	deadline := time.Now().Add(ListenWait)
	pauses := backoff.New(firstPause, longestPause)
	return func(ctx context.Context) bool {
		return time.Now().Add(longestPause).Before(deadline) && pauses.Wait(ctx) == nil
	}
}
