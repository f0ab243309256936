package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/bounded"
)

// TestServerReachesAgent checks that a server may have more connections to an agent,
// including sandboxes' WebSockets, than strangers may have to a server.
func TestServerReachesAgent(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, for its own network namespace")
	}
	runtime.LockOSThread() // never unlocked, so the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	address := netip.MustParseAddr("192.0.2.1") // not a loopback address, because those have no limit
	if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: address.AsSlice(), Mask: net.CIDRMask(32, 32)}}); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	begun, served := make(chan struct{}), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			served <- err
			return
		}
		served <- serve(ctx, "192.0.2.1:7000", nil, nil, http.NotFoundHandler(), nil, func(ctx context.Context) error {
			close(begun) // the agent listens
			<-ctx.Done()
			return nil
		})
	}()
	select {
	case <-begun:
	case err := <-served:
		t.Fatal(err)
	}
	open := make([]net.Conn, 0, bounded.PerAddress)
	t.Cleanup(func() {
		cancel()
		for _, c := range open {
			c.Close()
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	for range bounded.PerAddress + 1 {
		c, err := net.DialTimeout("tcp", "192.0.2.1:7000", await.Hang)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	last := open[bounded.PerAddress]
	_ = last.SetDeadline(time.Now().Add(await.Hang))
	fmt.Fprint(last, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	b := make([]byte, len("HTTP/1.1 404"))
	if _, err := last.Read(b); err != nil || string(b) != "HTTP/1.1 404" {
		t.Errorf("beside %d others a connection ends: %q, %v", bounded.PerAddress, b, err)
	}
}
