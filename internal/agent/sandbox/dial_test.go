package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"
)

// closedPort is an address on which nothing listens.
func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.255.253:0", claimNet(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// TestDialWaitsForServer starts to listen once a connection was refused.
func TestDialWaitsForServer(t *testing.T) {
	address := closedPort(t)
	tries := 0
	d := &net.Dialer{Control: func(string, string, syscall.RawConn) error {
		if tries++; tries == 2 {
			l, err := net.Listen("tcp", address)
			if err != nil {
				return err
			}
			t.Cleanup(func() { l.Close() })
		}
		return nil
	}}
	conn, err := dialPort(t.Context(), d, address)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if tries != 2 {
		t.Errorf("connected at try %d", tries)
	}
}

func TestDialGivesUp(t *testing.T) {
	tries := 0
	d := &net.Dialer{Control: func(string, string, syscall.RawConn) error { tries++; return nil }}
	began := time.Now()
	_, err := dialPort(t.Context(), d, closedPort(t))
	if took := time.Since(began); !errors.Is(err, syscall.ECONNREFUSED) || took < listenWait-longestRedial {
		t.Errorf("%v after %v", err, took)
	}
	if tries < 2 || tries > 40 {
		t.Errorf("%d tries", tries)
	}
	ctx, cancel := context.WithCancel(t.Context())
	d.Control = func(string, string, syscall.RawConn) error { cancel(); return nil }
	if _, err := dialPort(ctx, d, closedPort(t)); err == nil || time.Since(began) > 60*time.Second {
		t.Errorf("cancelled: %v", err)
	}
}

// TestDialEndsWithSandbox ends a sandbox while a request waits for a server in
// it: nobody may connect to its address any more.
func TestDialEndsWithSandbox(t *testing.T) {
	life, end := context.WithCancel(t.Context())
	defer end()
	tries := 0
	d := &net.Dialer{Control: func(string, string, syscall.RawConn) error {
		tries++
		end()
		return nil
	}}
	host, port, err := net.SplitHostPort(closedPort(t))
	if err != nil {
		t.Fatal(err)
	}
	transport := portTransport(life, d, host)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+net.JoinHostPort(host, port)+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := transport.RoundTrip(req)
	if err == nil {
		resp.Body.Close()
	}
	if err == nil || tries != 1 {
		t.Errorf("%d tries, %v", tries, err)
	}
}
