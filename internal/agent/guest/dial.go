package guest

import (
	"context"
	"net"
	"sync"
	"time"
)

// dialTimeout bounds the connection to a guest.
const dialTimeout = 10 * time.Second

// again has the pauses between attempts to connect, which run in parallel. The kernel
// repeats a lost first packet only after a second, and a restored guest drops those from
// a port with which it remembers a connection.
var again = []time.Duration{50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 600 * time.Millisecond}

// dial connects to the guest at target, an IP address and port.
func dial(ctx context.Context, target string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	var attempts sync.WaitGroup
	defer attempts.Wait()
	defer cancel()
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result)
	pending := 0
	attempt := func() {
		pending++
		attempts.Go(func() {
			var d net.Dialer
			conn, err := d.DialContext(ctx, "tcp", target)
			select {
			case results <- result{conn, err}:
			case <-ctx.Done():
				if conn != nil {
					conn.Close()
				}
			}
		})
	}
	attempt()
	timer := time.NewTimer(again[0])
	defer timer.Stop()
	for next := 1; ; {
		select {
		case r := <-results:
			if pending--; r.err == nil || pending == 0 {
				return r.conn, r.err
			}
		case <-timer.C:
			attempt()
			if next < len(again) {
				timer.Reset(again[next])
				next++
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
