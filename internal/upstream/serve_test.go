package upstream

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// plain serves h with a [Server], and passes what that leaves to net/http, which marks
// its responses.
func plain(t *testing.T, h http.HandlerFunc) (address string, l *Listener) {
	t.Helper()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{
		Handler: h, Takes: func(r *http.Request) bool {
			if r.Host == "panic" {
				panic(r.Host)
			}
			return r.Host != "other"
		},
		HeaderTimeout: await.Hang, IdleTimeout: await.Hang, ErrorLog: log.New(io.Discard, "", 0),
	}
	l = s.Listen(tcp)
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	rest := &http.Server{Protocols: &protocols, ErrorLog: s.ErrorLog, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("By", "net/http")
		h(w, r)
	})}
	go func() { _ = rest.Serve(l) }()
	t.Cleanup(func() { _ = rest.Close() })
	return tcp.Addr().String(), l
}

// client is one connection.
type client struct {
	*net.TCPConn
	br *bufio.Reader
}

func connect(t *testing.T, address string) *client {
	t.Helper()
	nc, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(await.Hang)); err != nil {
		t.Fatal(err)
	}
	return &client{nc.(*net.TCPConn), bufio.NewReader(nc)}
}

func (c *client) send(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

// response reads a response and its body.
func (c *client) response(t *testing.T, method string) (*http.Response, string) {
	t.Helper()
	resp, err := http.ReadResponse(c.br, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

// TestPlain checks which requests a [Server] serves, and which it leaves to net/http.
func TestPlain(t *testing.T) {
	address, _ := plain(t, func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s %s %v", r.Method, r.RequestURI, r.Host, b, err)
	})
	long := "X: " + strings.Repeat("x", maxPlain) + "\r\n"
	for _, c := range []struct {
		request string
		mine    bool
		status  int
	}{
		{"GET /a?b=%2f HTTP/1.1\r\nHost: x\r\n\r\n", true, 200},
		{"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n", true, 200},
		{"DELETE /a HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n", true, 200},
		{"OPTIONS /a HTTP/1.1\r\nHost: x\r\nX: \xc3\xa4\r\n\r\n", true, 200},
		{"GET / HTTP/1.1\r\nHost: other\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\n" + long + "\r\n", false, 200},
		{"GET / HTTP/1.0\r\nHost: x\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\nHost: x\n\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\nHost: x\n\n", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\n\r\n", false, 200},
		{"GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n", false, 200},
		{"PATCH / HTTP/1.1\r\nHost: x\r\n\r\n", false, 200},
		{"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\nConnection: X\r\nX: y\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\nTrailer: X\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\r\n\r\n", false, 400},
		{"GET / HTTP/1.1\r\nHost: \r\n\r\n", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\nhOsT: y\r\n\r\n", false, 400},
		{"GET / HTTP/1.1\r\nHost: x y\r\n\r\n", false, 400},
		{"GET / HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n", false, 400},
		{"GET / HTTP/1.1\r\nHost: x\r\nX: \x01\r\n\r\n", false, 400},
		{"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", false, 200},
		{"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: x\r\n\r\n", false, 501},
		{"GET /% HTTP/1.1\r\nHost: x\r\n\r\n", false, 400},
		{"GET / / HTTP/1.1\r\nHost: x\r\n\r\n", false, 400},
		{"\x16\x03\x01", false, 0},
	} {
		name, _, _ := strings.Cut(c.request, "\r\n\r\n")
		name = name[:min(len(name), 80)]
		conn := connect(t, address)
		if c.status == 0 {
			conn.send(t, c.request)
			if err := conn.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 400 ") {
				t.Errorf("%q: %q, %v", name, b, err)
			}
			continue
		}
		// Another request precedes it on the connection, in the same write.
		conn.send(t, "GET /first HTTP/1.1\r\nHost: x\r\n\r\n"+c.request)
		if first, body := conn.response(t, "GET"); first.Header["By"] != nil || body != "GET /first x  <nil>" {
			t.Errorf("before %q: %q, by %q", name, body, first.Header["By"])
		}
		method, _, _ := strings.Cut(c.request, " ")
		resp, body := conn.response(t, method)
		mine := resp.Header["By"] == nil && resp.StatusCode != 400 && resp.StatusCode != 501
		if resp.StatusCode != c.status || mine != c.mine {
			t.Errorf("%q: %d, mine %v, %q", name, resp.StatusCode, mine, body)
		}
		if strings.HasSuffix(c.request, "hi") && !strings.HasSuffix(body, " hi <nil>") {
			t.Errorf("%q: the body is lost: %q", name, body)
		}
	}
}

// answers are handlers with all kinds of responses.
var answers = map[string]http.HandlerFunc{
	"nothing": func(http.ResponseWriter, *http.Request) {},
	"length": func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Length"] = []string{"5"}
		w.Header()["X"] = []string{"a", "b\r\nY: c"}
		_, _ = io.WriteString(w, "hello")
	},
	"chunks": func(w http.ResponseWriter, _ *http.Request) {
		for range 3 {
			_, _ = io.WriteString(w, strings.Repeat("x", 3000))
			_ = http.NewResponseController(w).Flush()
		}
	},
	"trailer": func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "Known, Unset")
		_, _ = io.WriteString(w, "hello")
		w.(http.Flusher).Flush()
		w.Header().Set("Known", "1")
		w.Header().Set(http.TrailerPrefix+"Unknown", "2")
		w.Header().Set("Late", "3")
	},
	"204": func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNoContent)
		if _, err := io.WriteString(w, "hello"); !errors.Is(err, http.ErrBodyNotAllowed) {
			panic(err)
		}
	},
	"304": func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Etag", `"x"`)
		w.WriteHeader(http.StatusNotModified)
	},
	"early": func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "<x>")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("Content-Length", "1")
		_, _ = io.WriteString(w, "x")
	},
	"unknown": func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", "yesterday")
		w.Header().Set("Content-Length", "0")
		w.WriteHeader(799)
	},
	"close": func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "close")
		w.Header().Set("Content-Length", "0")
	},
	"long": func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "3")
		if _, err := io.WriteString(w, "hello"); !errors.Is(err, http.ErrContentLength) {
			panic(err)
		}
		_, _ = io.WriteString(w, "yes")
	},
	"short": func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "50")
		_, _ = io.WriteString(w, "hello")
	},
	"abort": func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "hello")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	},
	"panic": func(http.ResponseWriter, *http.Request) { panic("at the disco") },
}

// TestAnswers checks that clients get the same from a [Server] as from net/http.
func TestAnswers(t *testing.T) {
	address, _ := plain(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Content-Type"] = []string{"text/plain"}
		answers[r.URL.Path[1:]](w, r)
	})
	// get returns everything observable of a response, and whether the connection stays
	// open.
	get := func(method, name, host string) string {
		var out strings.Builder
		conn := connect(t, address)
		conn.send(t, method+" /"+name+" HTTP/1.1\r\nHost: "+host+"\r\n\r\n")
		for {
			resp, err := http.ReadResponse(conn.br, &http.Request{Method: method})
			if err != nil {
				return out.String() + err.Error()
			}
			b, err := io.ReadAll(resp.Body)
			if by := resp.Header["By"]; (by == nil) == (host == "other") && resp.StatusCode >= 200 {
				t.Errorf("%s %s %s: answered by %q", method, name, host, by)
			}
			resp.Header.Del("By")
			if date := resp.Header.Get("Date"); date != "yesterday" && resp.StatusCode >= 200 {
				if _, err := http.ParseTime(date); err != nil {
					t.Errorf("%s %s %s: %v", method, name, host, err)
				}
				resp.Header.Del("Date")
			}
			if resp.StatusCode == 304 {
				resp.Header.Del("Content-Type") // net/http omits it.
			}
			fmt.Fprintf(&out, "%d %v %d %v %q %v %v %v\n", resp.StatusCode, resp.Header, resp.ContentLength, resp.TransferEncoding, b, err, resp.Trailer, resp.Close)
			if err != nil {
				return out.String()
			}
			if resp.StatusCode < 200 {
				continue
			}
			// The next response belongs to this request, unless the connection has ended.
			conn.send(t, "GET /nothing HTTP/1.1\r\nHost: "+host+"\r\n\r\n")
			if _, err = http.ReadResponse(conn.br, nil); err == nil {
				return out.String() + "goes on"
			}
			return out.String() + "ends"
		}
	}
	for name := range answers {
		for _, method := range []string{"GET", "HEAD", "DELETE"} {
			if method == "HEAD" && name == "trailer" {
				continue // net/http sends it there.
			}
			if mine, theirs := get(method, name, "x"), get(method, name, "other"); mine != theirs {
				t.Errorf("%s %s:\n%s\nnet/http:\n%s", method, name, mine, theirs)
			}
		}
	}
}

// TestClientLeaves checks that only the request of a client that disconnects ends.
func TestClientLeaves(t *testing.T) {
	came, ended := make(chan *served), make(chan error)
	answer := make(chan struct{})
	address, _ := plain(t, func(w http.ResponseWriter, r *http.Request) {
		came <- w.(*reply).c
		select {
		case <-r.Context().Done():
			ended <- r.Context().Err()
		case <-answer:
		}
	})
	conn := connect(t, address)
	for range 3 {
		conn.send(t, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
		c := <-came
		await.Until(t, "the server looks whether the client leaves", func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.looking != nil
		})
		// Another request must not end one.
		conn.send(t, "GET /next HTTP/1.1\r\nHost: x\r\n\r\n")
		answer <- struct{}{}
		conn.response(t, "GET")
		<-came
		answer <- struct{}{}
		conn.response(t, "GET")
	}
	conn.send(t, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	<-came
	_ = conn.Close()
	if err := await.Recv(t, "the end of the request", ended); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestPanic checks that a panic outside of the handler ends only its connection.
func TestPanic(t *testing.T) {
	address, l := plain(t, func(http.ResponseWriter, *http.Request) {})
	bad, good := connect(t, address), connect(t, address)
	bad.send(t, "GET / HTTP/1.1\r\nHost: panic\r\n\r\n")
	if b, err := io.ReadAll(bad); len(b) > 0 || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	good.send(t, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	good.response(t, "GET")
	_ = l.Close()
	if err := l.Wait(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestListenerCloses checks that connections without a request close at once, and the
// others after their response.
func TestListenerCloses(t *testing.T) {
	came, answer := make(chan struct{}), make(chan struct{})
	address, l := plain(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(came)
			<-answer
		}
	})
	idle, busy, fresh := connect(t, address), connect(t, address), connect(t, address)
	idle.send(t, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	idle.response(t, "GET")
	busy.send(t, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
	<-came
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, conn := range []*client{idle, fresh} {
		if n, err := conn.Read(make([]byte, 1)); n > 0 || err == nil {
			t.Errorf("a connection without a request: %d, %v", n, err)
		}
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	waited := make(chan error)
	go func() { waited <- l.Wait(t.Context()) }()
	select {
	case err := <-waited:
		t.Fatalf("Wait returned %v during a request", err)
	default:
	}
	close(answer)
	if resp, _ := busy.response(t, "GET"); !resp.Close {
		t.Error("the connection of the last request is still open")
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
	if err := l.Wait(gone); err != nil {
		t.Error(err)
	}
}

// TestListenerAnswersFirst checks that first requests that arrive before the listener
// closes get a response, whoever serves them.
func TestListenerAnswersFirst(t *testing.T) {
	address, l := plain(t, func(http.ResponseWriter, *http.Request) {})
	l.freshWait = await.Hang
	requests := []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi", "GET / HTTP/1.1\r\nHost: other\r\n\r\n",
	}
	var conns []*client
	for range requests {
		conns = append(conns, connect(t, address))
	}
	await.Until(t, "the connections are accepted", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.conns) == len(conns)
	})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for i, conn := range conns {
		conn.send(t, requests[i])
		if resp, _ := conn.response(t, "GET"); resp.StatusCode != 200 || !resp.Close && i == 0 {
			t.Errorf("%q: %v", requests[i], resp)
		}
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept continues: %v", err)
	}
	if err := l.Wait(t.Context()); err != nil {
		t.Error(err)
	}
}

// late is a listener that accepts a connection just as it is closed.
type late struct {
	net.Listener
	conn   chan net.Conn
	closed chan struct{}
}

func (l *late) Accept() (net.Conn, error) {
	<-l.closed
	select {
	case c := <-l.conn:
		return c, nil
	default:
		return nil, net.ErrClosed
	}
}

func (l *late) Close() error {
	close(l.closed)
	return nil
}

// TestListenerAnswersLast checks that a connection accepted just as the listener closes
// gets a response.
func TestListenerAnswersLast(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	client := connect(t, tcp.Addr().String())
	accepted, err := tcp.Accept()
	if err != nil {
		t.Fatal(err)
	}
	in := &late{conn: make(chan net.Conn, 1), closed: make(chan struct{})}
	in.conn <- accepted
	l := (&Server{
		Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), Takes: func(*http.Request) bool { return true },
		HeaderTimeout: await.Hang, IdleTimeout: await.Hang,
	}).Listen(in)
	l.freshWait = await.Hang
	client.send(t, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if resp, _ := client.response(t, "GET"); resp.StatusCode != 200 {
		t.Error(resp.Status)
	}
	if err := l.Wait(await.Context(t)); err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept continues: %v", err)
	}
}

// TestClientTakesNothing checks that a response ends if its client does not read it.
func TestClientTakesNothing(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	l := (&Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			var err error
			for err == nil {
				_, err = w.Write(make([]byte, 1<<20))
			}
			ended <- err
		}),
		Takes:         func(*http.Request) bool { return true },
		HeaderTimeout: await.Hang, IdleTimeout: await.Hang, WriteIdle: 100 * time.Millisecond,
	}).Listen(tcp)
	defer l.Close()
	conn := connect(t, tcp.Addr().String())
	conn.send(t, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if err := await.Recv(t, "the end of the answer", ended); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}

// TestWaitEnds checks that Wait ends requests that take too long.
func TestWaitEnds(t *testing.T) {
	came := make(chan struct{})
	address, l := plain(t, func(_ http.ResponseWriter, r *http.Request) {
		close(came)
		<-r.Context().Done()
	})
	conn := connect(t, address)
	conn.send(t, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	<-came
	_ = l.Close()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Wait(gone); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := l.Wait(t.Context()); err != nil {
		t.Error(err)
	}
}

// seen is what a handler sees of a request.
type seen struct {
	method, uri, host, path, rawPath, query, proto string
	header                                         http.Header
	length                                         int64
}

func see(r *http.Request) seen {
	return seen{r.Method, r.RequestURI, r.Host, r.URL.Path, r.URL.RawPath, r.URL.RawQuery, r.Proto, r.Header, r.ContentLength}
}

// FuzzPlain checks that net/http sees the same request in every header that a [Server]
// accepts, and nothing after it.
func FuzzPlain(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HEAD /a?b#c HTTP/1.1\r\nhost: x\r\nA: b\r\n c\r\nA: d\r\n\r\n",
		"DELETE // HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n", "GET / HTTP/1.1\nHost: x\r\n\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"OPTIONS /%zz HTTP/1.1\r\nHost: x:1\r\nTransfer-Encoding: chunked\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		end := bytes.Index(b, []byte("\r\n\r\n"))
		if end < 0 || end+4 > maxPlain || !plausible(b) {
			return
		}
		b = b[:end+4]
		c := &served{br: bufio.NewReaderSize(bytes.NewReader(b), maxPlain)}
		if _, err := c.br.Peek(len(b)); err != nil {
			t.Fatal(err)
		}
		mine := c.parse(len(b))
		if mine == nil {
			return
		}
		var theirs []seen
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { theirs = append(theirs, see(r)) }))
		server.Config.ErrorLog = log.New(io.Discard, "", 0)
		server.Start()
		defer server.Close()
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
		_ = conn.(*net.TCPConn).CloseWrite()
		answer, _ := io.ReadAll(conn)
		if len(theirs) != 1 || !reflect.DeepEqual(see(mine), theirs[0]) {
			t.Errorf("%q:\n%+v\nnet/http:\n%+v\n%s", b, see(mine), theirs, answer)
		}
	})
}

// TestUnread has a client that reads nothing: the handler's write deadline ends its
// writes.
func TestUnread(t *testing.T) {
	ended := make(chan error, 1)
	address, _ := plain(t, func(w http.ResponseWriter, _ *http.Request) {
		err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		for piece := make([]byte, 32<<10); err == nil; {
			_, err = w.Write(piece)
		}
		ended <- err
	})
	connect(t, address).send(t, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if err := await.Recv(t, "the write ends", ended); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}
