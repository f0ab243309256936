package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/linger"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// TestConnectionClose stops a server while clients keep connections open: it responds to their
// next request, and announces that the connection ends.
func TestConnectionClose(t *testing.T) {
	asked, ask := context.WithCancel(t.Context())
	defer ask()
	waits, over := make(chan time.Duration, 1), make(chan struct{})
	leave := &connectionClose{asked: asked, sleep: func(d time.Duration) {
		waits <- d
		<-over
	}}
	ctx, cancel := leave.context()
	defer cancel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	toPort := func(r *http.Request) bool { return r.Host == "port" }
	go func() {
		answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
		served <- serveOn(ctx, linger.Listener(l), nil, netaddr.Server(leave.handler(answer)), toPort, func(ctx context.Context) error {
			<-ctx.Done()
			return nil
		})
	}()
	const post = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
	requests := []string{post, "GET / HTTP/1.1\r\nHost: port\r\n\r\n"}
	var clients []*bufio.ReadWriter
	for range requests {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(await.Hang)); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriterSize(c, 0)))
	}
	send := func(closes bool) {
		t.Helper()
		for i, c := range clients {
			fmt.Fprint(c, requests[i])
			if err := c.Flush(); err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(c.Reader, nil)
			if err != nil {
				t.Fatalf("%q: %v", requests[i], err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.Close != closes {
				t.Errorf("%q: the connection ends: %v, not %v; %v", requests[i], resp.Close, closes, err)
			}
		}
	}
	send(false)
	ask()
	if d := await.Recv(t, "the server is asked to stop", waits); d > keptFor {
		t.Errorf("waits for %v", d)
	}
	send(true)
	close(over)
	if err := await.Recv(t, "the server's end", served); err != nil {
		t.Error(err)
	}
}
