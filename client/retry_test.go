package client

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
)

// TestUnsent checks that the client waits for a service that is not up yet, even with
// calls that must not run twice. It does not retry a call that the service accepted
// without responding.
func TestUnsent(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	s := &service{answers: []string{`{}`}}
	server := httptest.NewUnstartedServer(s)
	start := sync.OnceFunc(func() {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Error(err)
			return
		}
		server.Listener.Close()
		server.Listener = l
		server.Start()
	})
	// The service starts when the first connection has failed.
	c, err := New("http://"+address, "key", WithHTTPClient(&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			if err != nil {
				start()
			}
			return conn, err
		},
	}}))
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Exec(t.Context(), "cl-1", Command{Cmd: "true"}, nil)
	defer server.Close()
	if err != nil || len(s.asked) != 1 {
		t.Errorf("requests %q: %v", s.asked, err)
	}

	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	taken := make(chan int)
	go func() {
		n := 0
		defer func() { taken <- n }()
		for ; ; n++ {
			conn, err := silent.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 1))
			conn.Close()
		}
	}()
	if c, err = New("http://"+silent.Addr().String(), "key"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Exec(t.Context(), "cl-1", Command{Cmd: "true"}, nil); err == nil {
		t.Error("no error")
	}
	silent.Close()
	if n := <-taken; n != 1 {
		t.Errorf("%d requests", n)
	}
}
