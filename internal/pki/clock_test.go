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

// meet lets two ends shake hands over an in-memory connection, which moving the clock
// does not disturb, and returns both ends' errors.
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

// TestClock moves the clock. The control plane's certificate is replaced every 12 hours
// and is valid for 24. A certificate that was not replaced, or a host's leaf that is 7
// days old, is refused.
func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, host := authority(t), uuid.New()
		c, err := NewCaller(a)
		if err != nil {
			t.Fatal(err)
		}
		still, err := NewCaller(a) // nothing renews it
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
				t.Fatalf("after %v: the certificate is an old one", time.Since(begun))
			}
			seen[Serial(leaf)] = true
			if left := time.Until(leaf.NotAfter); left < ServerLasts-ServerSwaps {
				t.Errorf("a minute before its replacement, the certificate is valid for %v", left)
			}
			if _, err := meet(l.TLS(), client); err != nil {
				t.Errorf("after %v: %v", time.Since(begun), err)
			}
			caller, refused := meet(l.TLS(), old)
			if expired := time.Since(begun) > ServerLasts; (refused != nil) != expired || caller == nil && expired {
				t.Errorf("after %v the host's error for a certificate that was not replaced: %v", time.Since(begun), refused)
			}
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if now := c.current.Load().Leaf; Serial(now) == Serial(leaf) {
				t.Fatalf("after %v: not replaced", time.Since(begun))
			}
			time.Sleep(ServerSwaps - 2*time.Minute)
		}
		if len(seen) != int(HostLasts/ServerSwaps)-1 {
			t.Errorf("%d certificates in %v", len(seen), HostLasts)
		}
		// The host's leaf is valid exactly until its end.
		time.Sleep(time.Until(l.NotAfter()) - time.Second)
		if caller, refused := meet(l.TLS(), client); caller != nil || refused != nil {
			t.Errorf("a second before its end: %v, %v", caller, refused)
		}
		time.Sleep(3 * time.Second)
		if caller, _ := meet(l.TLS(), client); caller == nil {
			t.Error("a host with an expired leaf is accepted")
		}
	})
}
