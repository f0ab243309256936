package upstream

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// logged is a log that a test can read.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// text returns the log. The server logs a panic before it closes the connection, and
// everything else before it responds.
func (l *logged) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// hostile returns proxies, over HTTP/1.1 and HTTP/2, to a guest at addr.
func hostile(t *testing.T, tr http.RoundTripper, addr string) (fronts map[string]*httptest.Server, logs *logged) {
	t.Helper()
	logs = new(logged)
	p := &Proxy{
		Transport: tr,
		Rewrite:   func(pr *httputil.ProxyRequest) { pr.Out.URL.Scheme, pr.Out.URL.Host = "http", addr },
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, err.Error(), http.StatusBadGateway)
		},
		ErrorLog: log.New(logs, "", 0),
	}
	fronts = make(map[string]*httptest.Server)
	for _, version := range []string{"HTTP/1.1", "HTTP/2.0"} {
		f := httptest.NewUnstartedServer(p)
		f.Config.ErrorLog = p.ErrorLog
		if version == "HTTP/2.0" {
			f.EnableHTTP2 = true
			f.StartTLS()
		} else {
			f.Start()
		}
		t.Cleanup(f.Close)
		fronts[version] = f
	}
	return fronts, logs
}

// ask sends a request and reads the whole response. HTTP/2 has no Upgrade.
func ask(t *testing.T, f *httptest.Server, method string, upgrade bool) (resp *http.Response, body string, err error) {
	t.Helper()
	req, err := http.NewRequestWithContext(await.Context(t), method, f.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	if upgrade {
		req.Header.Set("Connection", "Upgrade")
		req.Header.Set("Upgrade", "websocket")
	}
	if resp, err = f.Client().Transport.RoundTrip(req); err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, string(b), err
}

// TestHostileGuest checks what clients get when a guest's HTTP/1.1 response is invalid: a
// 502 for the first and the second request over a connection, each sent once, and nothing
// in the proxy's log.
func TestHostileGuest(t *testing.T) {
	const bad = http.StatusBadGateway
	for _, tt := range []struct {
		name, response string
		want           int
		upgrade        int // the status for an upgrade request; 0: the same
	}{
		{"status 0", "HTTP/1.1 000 X\r\n\r\n", bad, 0},
		{"status 42", "HTTP/1.1 042 X\r\n\r\n", bad, 0},
		{"status 99", "HTTP/1.1 +99 X\r\nContent-Length: 0\r\n\r\n", bad, 0},
		{"status 42 after 103", "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 042 X\r\n\r\n", bad, 0},
		{"status 1000", "HTTP/1.1 1000 X\r\nContent-Length: 0\r\n\r\n", bad, 0},
		{"negative", "HTTP/1.1 -42 X\r\nContent-Length: 0\r\n\r\n", bad, 0},
		{"status 999", "HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n", 999, 0},
		{"bare 101", "HTTP/1.1 101 Switching Protocols\r\n\r\n", bad, 0},
		{"101", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", bad, 0},
		{"interim", strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 1000), bad, 0},
		{"length of 204", "HTTP/1.1 204 No Content\r\nContent-Length: -5\r\n\r\n", bad, 0},
		{"length of 304", "HTTP/1.1 304 Not Modified\r\nContent-Length: x\r\n\r\n", bad, 0},
		{"length", "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", bad, 0},
		{"lengths", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", bad, 0},
		{"204 with a body", "HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\nabc", 204, 0},
		{"304 with a body", "HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\nabc", 304, 0},
		{"204 in chunks", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 204, 0},
		{"header name", "HTTP/1.1 200 OK\r\nX (y): z\r\nContent-Length: 0\r\n\r\n", bad, 0},
		{"header value", "HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 0\r\n\r\n", bad, 0},
		{"both lengths", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n0\r\n\r\n", 200, 0},
		{"trailers", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Cache-Control, a b\r\n\r\n0\r\nCache-Control: x\r\nSet-Cookie: y\r\nIf-Match: z\r\n\r\n", 200, 0},
		{"too much", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 042 X\r\n\r\n", 200, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var requests atomic.Int64
			s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
				for {
					req, _, err := take(r)
					if err != nil {
						return
					}
					requests.Add(1)
					if req.URL.Path == "/first" {
						respond(c, "x")
						continue
					}
					_, _ = io.WriteString(c, tt.response)
				}
			})
			fronts, logs := hostile(t, s.Transport, s.Addr().String())
			for version, f := range fronts {
				for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodHead} {
					for _, upgrade := range []bool{false, true} {
						if upgrade && version != "HTTP/1.1" {
							continue
						}
						what := fmt.Sprintf("%s %s, upgrade %v", version, method, upgrade)
						// The first request makes the guest's connection a kept one.
						first, err := f.Client().Get(f.URL + "/first")
						if err != nil {
							t.Fatalf("%s: %v", what, err)
						}
						_, _ = io.Copy(io.Discard, first.Body)
						first.Body.Close()
						requests.Store(0)
						resp, body, err := ask(t, f, method, upgrade)
						if err != nil || resp.StatusCode != tt.want {
							t.Fatalf("%s: %v, %q, %v, want %d", what, resp, body, err, tt.want)
						}
						if n := requests.Load(); n != 1 {
							t.Errorf("%s: sent %d times", what, n)
						}
					}
				}
			}
			if got := logs.text(); got != "" {
				t.Errorf("the log has %s", got)
			}
		})
	}
}

// frames is a guest that speaks HTTP/2 and responds with what respond writes.
func frames(t *testing.T, respond func(f *http2.Framer, stream uint32, header func(end bool, fields ...string))) net.Addr {
	t.Helper()
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		preface := make([]byte, len(http2.ClientPreface))
		if _, err := io.ReadFull(r, preface); err != nil {
			return
		}
		f := http2.NewFramer(c, r)
		_ = f.WriteSettings()
		var block bytes.Buffer
		encoder := hpack.NewEncoder(&block)
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				return
			}
			switch frame := frame.(type) {
			case *http2.SettingsFrame:
				if !frame.IsAck() {
					_ = f.WriteSettingsAck()
				}
			case *http2.HeadersFrame:
				id := frame.StreamID
				respond(f, id, func(end bool, fields ...string) {
					block.Reset()
					for i := 0; i < len(fields); i += 2 {
						_ = encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
					}
					_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndStream: end, EndHeaders: true})
				})
			}
		}
	})
	return s.Addr()
}

// TestHostileHTTP2Guest is [TestHostileGuest] for guests that speak HTTP/2.
func TestHostileHTTP2Guest(t *testing.T) {
	type header = func(end bool, fields ...string)
	only := func(fields ...string) func(*http2.Framer, uint32, header) {
		return func(_ *http2.Framer, _ uint32, h header) { h(true, fields...) }
	}
	const bad = http.StatusBadGateway
	for _, tt := range []struct {
		name    string
		respond func(*http2.Framer, uint32, header)
		want    int
	}{
		{"status 0", only(":status", "0"), bad},
		{"status 42", only(":status", "042"), bad},
		{"status 1000", only(":status", "1000"), bad},
		{"negative", only(":status", "-42"), bad},
		{"status 999", only(":status", "999"), 999},
		{"101", only(":status", "101"), bad},
		{"101 without end", func(_ *http2.Framer, _ uint32, h header) { h(false, ":status", "101") }, bad},
		{"interim", func(_ *http2.Framer, _ uint32, h header) {
			for range 1000 {
				h(false, ":status", "103")
			}
		}, bad},
		{"length", only(":status", "200", "content-length", "x"), bad},
		{"negative length", only(":status", "204", "content-length", "-5"), bad},
		{"lengths", only(":status", "200", "content-length", "1", "content-length", "2"), bad},
		{"204 with a body", func(f *http2.Framer, id uint32, h header) {
			h(false, ":status", "204")
			_ = f.WriteData(id, true, []byte("abc"))
		}, 204},
		{"304 with a body", func(f *http2.Framer, id uint32, h header) {
			h(false, ":status", "304", "content-length", "3")
			_ = f.WriteData(id, true, []byte("abc"))
		}, 304},
		{"header value", only(":status", "200", "x", "a\x00b"), bad},
		{"header name", only(":status", "200", "x y", "z"), bad},
		{"fields of one connection", only(":status", "200", "transfer-encoding", "chunked", "connection", "close", "upgrade", "x"), 200},
		{"trailers", func(f *http2.Framer, id uint32, h header) {
			h(false, ":status", "200", "trailer", "cache-control, a b, content-length")
			h(true, "cache-control", "x", "set-cookie", "y", "if-match", "z", "content-length", "7")
		}, 200},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr := frames(t, tt.respond)
			var protocols http.Protocols
			protocols.SetUnencryptedHTTP2(true)
			tr := &http.Transport{Protocols: &protocols, DisableCompression: true}
			t.Cleanup(tr.CloseIdleConnections)
			fronts, logs := hostile(t, tr, addr.String())
			for version, f := range fronts {
				for range 2 {
					resp, body, err := ask(t, f, http.MethodGet, false)
					if err != nil || resp.StatusCode != tt.want {
						t.Fatalf("%s: %v, %q, %v, want %d", version, resp, body, err, tt.want)
					}
				}
			}
			if got := logs.text(); got != "" {
				t.Errorf("the log has %s", got)
			}
		})
	}
}
