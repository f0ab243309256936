package pki

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
)

// meet has two ends shake hands over a connection in memory, which a clock that
// is moved does not disturb, and returns what the caller and the host say.
func meet(server, client *tls.Config) (caller, host error) {
	a, b := net.Pipe()
	served := make(chan error, 1)
	go func() {
		defer b.Close()
		s := tls.Server(b, server)
		_, err := s.Write([]byte{1})
		served <- err
	}()
	_, caller = io.ReadFull(tls.Client(a, client), make([]byte, 1))
	a.Close()
	return caller, <-served
}

// TestClock moves the clock: the control plane's certificate is replaced every
// 12 hours and each holds for 24; without that, and when a host's leaf is 7
// days old, the other end refuses.
func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, host := authority(t), uuid.New()
		c, err := NewCaller(a)
		if err != nil {
			t.Fatal(err)
		}
		still, err := NewCaller(a) // which nobody runs
		if err != nil {
			t.Fatal(err)
		}
		l := listener(t, a, hostLeaf(t, a, host, "127.0.0.1"))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go c.Run(ctx, slog.New(slog.DiscardHandler))
		client, old := c.TLS(host, "127.0.0.1", trust), still.TLS(host, "127.0.0.1", trust)
		begun := time.Now()
		seen := make(map[string]bool)
		time.Sleep(ServerSwaps - time.Minute)
		for time.Since(begun) < HostLasts-time.Minute {
			synctest.Wait()
			leaf := c.current.Load().Leaf
			if seen[Serial(leaf)] {
				t.Fatalf("%v on: the certificate is one from before", time.Since(begun))
			}
			seen[Serial(leaf)] = true
			if left := time.Until(leaf.NotAfter); left < ServerLasts-ServerSwaps {
				t.Errorf("a minute before it is replaced the certificate holds for %v", left)
			}
			if _, err := meet(l.TLS(), client); err != nil {
				t.Errorf("%v on: %v", time.Since(begun), err)
			}
			caller, refused := meet(l.TLS(), old)
			if expired := time.Since(begun) > ServerLasts; (refused != nil) != expired || caller == nil && expired {
				t.Errorf("%v on the host says of a certificate that was not replaced: %v", time.Since(begun), refused)
			}
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if now := c.current.Load().Leaf; Serial(now) == Serial(leaf) {
				t.Fatalf("%v on: not replaced", time.Since(begun))
			}
			time.Sleep(ServerSwaps - 2*time.Minute)
		}
		if len(seen) != int(HostLasts/ServerSwaps)-1 {
			t.Errorf("%d certificates in %v", len(seen), HostLasts)
		}
		// The host's leaf holds to the end of its time, and not a moment longer.
		time.Sleep(time.Until(l.NotAfter()) - time.Second)
		if caller, refused := meet(l.TLS(), client); caller != nil || refused != nil {
			t.Errorf("a second before its end: %v, %v", caller, refused)
		}
		time.Sleep(3 * time.Second)
		if caller, _ := meet(l.TLS(), client); caller == nil {
			t.Error("a host is called whose leaf has expired")
		}
	})
}
