package upstream

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/linger"
)

// tell responds with what it sees of a request, in ways that depend on its path.
func tell(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	h := w.Header()
	h["Content-Type"], h["Date"] = []string{"text/plain"}, []string{"today"}
	text := fmt.Sprintf("%+v %q %v", see(r), b, err)
	switch {
	case strings.HasPrefix(r.URL.Path, "/n"):
		w.WriteHeader(http.StatusNoContent)
		return
	case strings.HasPrefix(r.URL.Path, "/e"):
		h["Connection"] = []string{"close"}
	case strings.HasPrefix(r.URL.Path, "/p"):
		panic(http.ErrAbortHandler)
	}
	if strings.HasPrefix(r.URL.Path, "/c") {
		_ = http.NewResponseController(w).Flush()
	} else {
		h["Content-Length"] = []string{fmt.Sprint(len(text))}
	}
	_, _ = io.WriteString(w, text)
}

// exchange sends stream in two writes, the first of cut bytes, then the end of the
// stream, and returns everything observable of the responses.
func exchange(t *testing.T, address string, stream []byte, cut int) string {
	t.Helper()
	conn := connect(t, address)
	defer conn.Close()
	go func() {
		// The server may have closed the connection.
		_, _ = conn.Write(stream[:cut])
		_, _ = conn.Write(stream[cut:])
		_ = conn.CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return closes.ReplaceAllString(lengths.ReplaceAllString(string(got), "$2$1"), "$2$1")
}

// net/http writes these before other fields, a [Server] after them.
var (
	lengths = regexp.MustCompile("(Content-Length: [0-9]+\r\n)((Connection: close\r\n)?Content-Type: text/plain\r\nDate: today\r\n)")
	closes  = regexp.MustCompile("(Connection: close\r\n)(Content-Type: text/plain\r\nDate: today\r\n((Content-Length|Transfer-Encoding): .*\r\n)?)")
)

// FuzzStream checks that a client gets the same bytes from a [Server] with net/http
// behind it as from net/http alone, whatever it sends.
func FuzzStream(f *testing.F) {
	const get = "GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
	for _, s := range []string{
		get + get, "HEAD /c HTTP/1.1\r\nHost: x\r\n\r\n" + get, "DELETE /n HTTP/1.1\r\nHost: x\r\n\r\n" + get,
		"HEAD /n HTTP/1.1\r\nHost: x\r\n\r\n" + get,
		get + "POST /c HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n!!" + get,
		get + "GET /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nGET /\r\n0\r\n\r\n" + get,
		"GET /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get,
		"GET /a HTTP/1.1\r\nHost: x\r\nContent-Length: 0, 0\r\n\r\n" + get, "DELETE /e HTTP/1.1\r\nHost: x\r\n\r\n" + get,
		"GET /a HTTP/1.1\nHost: x\n\n", "GET /a HTTP/1.1\nHost: x\n\n" + get, "GET /a HTTP/1.1\r\nHost: x\r\n\n" + get, "GET /a HTTP/1.1\nHost: x\r\n\r\n" + get,
		"GET /a HTTP/1.1\r\nX: y\nHost: y\r\nHost: x\r\n\r\n" + get, "GET /a HTTP/1.1\r\nX: y\r\n Host: y\r\nHost: x\r\n\r\n" + get,
		"GET /a HTTP/1.1\r\nX: y\rHost: y\r\nHost: x\r\n\r\n" + get, "GET /a HTTP/1.1\r\nHost : x\r\nHost: x\r\n\r\n" + get,
		"GET /a HTTP/1.1\r\n Host: y\r\nHost: x\r\n\r\n" + get, "GET /a HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n" + get,
		"GET /a HTTP/1.1\r\nHost: u@X.y.:080\r\n\r\n" + get, "GET /a HTTP/1.1\r\nHost: x/\r\n\r\n" + get, "GET /a HTTP/1.1\r\nHost: [::1%25a]:1\r\n\r\n",
		"GET http://y/a HTTP/1.1\r\nHost: x\r\n\r\n" + get, "GET //y/a HTTP/1.1\r\nHost: x\r\n\r\n" + get, "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n" + get,
		"OPTIONS /a HTTP/1.0\r\nHost: x\r\n\r\n" + get, "GET /a HTTP/1.2\r\nHost: x\r\n\r\n" + get, "GET /a HTTP/01.1\r\nHost: x\r\n\r\n" + get,
		"GET /a\r\n\r\n" + get, "GET /a HTTP/1.1\r\nHost: x", "GET /a HT", "GET", "\r\n" + get, get + "\r\n" + get, get + "\x00",
		"GET /p HTTP/1.1\r\nHost: x\r\n\r\n" + get, "GET /a?\xff%zz;a#b HTTP/1.1\r\nHost: x\r\n\r\n" + get,
		"GET /a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n" + get, "GET /a HTTP/1.1\r\nHost: other\r\n\r\n" + get,
		"GET /a HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\nConnection: close\r\n\r\n" + get,
		"GET /a HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", maxPlain) + "\r\n\r\n" + get,
		"GET /a HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", maxPlain-len(get)-5) + "\r\n\r\n" + get,
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	} {
		for _, cut := range []uint16{0, 3, 20, uint16(len(s) - 1)} {
			f.Add([]byte(s), cut)
		}
	}
	quiet := log.New(io.Discard, "", 0)
	serve := func(wrap func(net.Listener) net.Listener) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			f.Fatal(err)
		}
		s := &http.Server{Handler: http.HandlerFunc(tell), ErrorLog: quiet, ReadHeaderTimeout: await.Hang}
		go func() { _ = s.Serve(wrap(linger.Listener(l))) }()
		f.Cleanup(func() { _ = s.Close() })
		return l.Addr().String()
	}
	theirs := serve(func(l net.Listener) net.Listener { return l })
	mine := serve(func(l net.Listener) net.Listener {
		return (&Server{
			Handler: http.HandlerFunc(tell), Takes: func(r *http.Request) bool { return r.Host != "other" },
			HeaderTimeout: await.Hang, IdleTimeout: await.Hang, ErrorLog: quiet,
		}).Listen(l)
	})
	f.Fuzz(func(t *testing.T, stream []byte, cut uint16) {
		if len(stream) > 4*maxPlain {
			return
		}
		at := min(int(cut), len(stream))
		m, n := exchange(t, mine, stream, at), exchange(t, theirs, stream, at)
		// For less than four bytes after a request, net/http sends no error.
		if m != n && m != n+"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n400 Bad Request" {
			t.Errorf("%q, cut at %d:\n%q\nnet/http:\n%q", stream, at, m, n)
		}
	})
}
