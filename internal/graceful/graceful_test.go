package graceful_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/graceful"
)

// gated is a listener that announces accepted connections and its end.
type gated struct {
	net.Listener
	accepted chan struct{}
	closed   chan struct{}
	close    func()
}

func (g *gated) Accept() (net.Conn, error) {
	c, err := g.Listener.Accept()
	if err == nil {
		g.accepted <- struct{}{}
	}
	return c, err
}

func (g *gated) Close() error {
	g.close()
	return g.Listener.Close()
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// echo sends the request's body back and closes the connection.
func echo(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Connection", "close")
	_, _ = io.Copy(w, r.Body)
}

// TestFirstRequest checks that a server responds to a connection's first request even if
// it arrives after the server was told to stop.
func TestFirstRequest(t *testing.T) {
	l := listen(t)
	closed := make(chan struct{})
	g := &gated{l, make(chan struct{}, 1), closed, sync.OnceFunc(func() { close(closed) })}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() {
		ended <- graceful.Serve(ctx, &http.Server{Handler: http.HandlerFunc(echo)}, g, nil, await.Hang)
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	await.Recv(t, "the server accepts", g.accepted)
	stop()
	await.Recv(t, "the listener is closed", g.closed)
	fmt.Fprint(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
	if err := c.SetDeadline(time.Now().Add(await.Hang)); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(resp.Body); string(body) != "hello" || err != nil {
		t.Errorf("%q, %v", body, err)
	}
	if err := await.Recv(t, "the server's end", ended); err != nil {
		t.Error(err)
	}
}

// TestSilent checks that a stopping server does not wait long for a silent connection,
// and aborts a request that does not end.
func TestSilent(t *testing.T) {
	l := listen(t)
	begun := make(chan struct{})
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() {
		srv := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			close(begun)
			<-r.Context().Done()
		})}
		ended <- graceful.Serve(ctx, srv, l, nil, time.Millisecond)
	}()
	for _, sends := range []string{"", "POST / HTTP/1.1\r\nHost: x\r\n", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"} {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, sends)
	}
	await.Recv(t, "a request begins", begun)
	stop()
	if err := await.Recv(t, "the server's end", ended); err != nil {
		t.Error(err)
	}
}

// TestFails checks that Serve returns the error of its listener.
func TestFails(t *testing.T) {
	l := listen(t)
	_ = l.Close()
	if err := graceful.Serve(t.Context(), &http.Server{}, l, nil, await.Hang); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

// TestTakesOver hands a socket from server to server while clients connect. One of them
// responds on each connection.
func TestTakesOver(t *testing.T) {
	l := listen(t)
	socket, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	_ = l.Close()
	serve := func() (stop func()) {
		next, err := net.FileListener(socket)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			ended <- graceful.Serve(ctx, &http.Server{Handler: http.HandlerFunc(echo)}, next, nil, await.Hang)
		}()
		return func() {
			cancel()
			if err := await.Recv(t, "a server's end", ended); err != nil {
				t.Error(err)
			}
		}
	}
	over := make(chan struct{})
	answers := make(chan struct{})
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			transport := &http.Transport{DisableKeepAlives: true}
			for {
				if err := ask(transport, l.Addr().String()); err != nil {
					t.Error(err)
				}
				select {
				case answers <- struct{}{}:
				case <-over:
					return
				}
			}
		})
	}
	stop := serve()
	for range 50 {
		await.Recv(t, "an answer", answers)
		stop()
		stop = serve()
	}
	close(over)
	clients.Wait()
	stop()
}

func ask(transport http.RoundTripper, address string) error {
	req, err := http.NewRequest(http.MethodPost, "http://"+address, http.NoBody)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return errors.Join(err, resp.Body.Close())
}
