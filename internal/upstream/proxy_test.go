package upstream

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/http/httputil"
	"net/textproto"
	"reflect"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// front returns a proxy to h.
func front(t *testing.T, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	behind := httptest.NewServer(h)
	t.Cleanup(behind.Close)
	tr := transport(dial)
	t.Cleanup(tr.Close)
	p := &Proxy{
		Transport: tr,
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL.Host = behind.Listener.Addr().String()
			pr.Out.Header.Set("X-Set", "by the proxy")
		},
		ModifyResponse: func(resp *http.Response) { resp.Header.Del("X-Secret") },
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, err.Error(), http.StatusBadGateway)
		},
	}
	f := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server", "the proxy's")
		p.ServeHTTP(w, r)
	}))
	t.Cleanup(f.Close)
	return f
}

func TestProxyHeaders(t *testing.T) {
	var got http.Header
	f := front(t, func(w http.ResponseWriter, r *http.Request) {
		got = r.Header
		h := w.Header()
		h["X-Many"] = []string{"a", "b"}
		h.Set("X-Secret", "s")
		h.Set("X-One-Hop", "s")
		h.Set("Keep-Alive", "timeout=5")
		h.Set("Connection", "x-one-hop")
		h.Set("Server", "the guest's")
		h.Set("Content-Encoding", "gzip")
		w.WriteHeader(http.StatusTeapot)
		fmt.Fprint(w, "not gzip")
	})
	req, err := http.NewRequestWithContext(await.Context(t), http.MethodGet, f.URL+"/a%2fb?q=%zz;x", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{
		"X-Many": {"a", "b"}, "X-Set": {"by the client"}, "X-One-Hop": {"x"}, "Connection": {"keep-alive, X-One-Hop"}, "Te": {"deflate, trailers"},
		"X-Forwarded-For": {"192.0.2.1"}, "Proxy-Authorization": {"x"}, "User-Agent": nil, "Accept-Encoding": {"br"},
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || string(b) != "not gzip" || resp.StatusCode != http.StatusTeapot || resp.ContentLength != 8 {
		t.Errorf("%s %q, %v", resp.Status, b, err)
	}
	if want := (http.Header{"X-Many": {"a", "b"}, "X-Set": {"by the proxy"}, "Te": {"trailers"}, "Accept-Encoding": {"br"}}); !reflect.DeepEqual(got, want) {
		t.Errorf("the upstream got %v, want %v", got, want)
	}
	resp.Header.Del("Date")
	resp.Header.Del("Content-Type") // net/http's guess
	want := http.Header{"X-Many": {"a", "b"}, "Server": {"the guest's"}, "Content-Encoding": {"gzip"}, "Content-Length": {"8"}}
	if !reflect.DeepEqual(resp.Header, want) {
		t.Errorf("the client got %v, want %v", resp.Header, want)
	}
}

// TestProxyGuessesNothing checks that a response without a Content-Type stays without
// one.
func TestProxyGuessesNothing(t *testing.T) {
	f := front(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Content-Type"] = nil
		fmt.Fprint(w, "<html>")
	})
	for _, upgrade := range []bool{false, true} {
		resp, _, err := ask(t, f, http.MethodPost, upgrade)
		if err != nil {
			t.Fatal(err)
		}
		if guess, ok := resp.Header["Content-Type"]; ok || resp.StatusCode != http.StatusOK {
			t.Errorf("with an upgrade %v: %s, Content-Type %q", upgrade, resp.Status, guess)
		}
	}
}

func TestProxyTrailers(t *testing.T) {
	f := front(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "X-Announced")
		fmt.Fprint(w, "body")
		w.Header().Set("X-Announced", "1")
		w.Header().Set(http.TrailerPrefix+"X-Late", "2")
	})
	resp, err := http.Get(f.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || string(b) != "body" || resp.Trailer.Get("X-Announced") != "1" || resp.Trailer.Get("X-Late") != "2" {
		t.Errorf("%q, %v, trailers %v", b, err, resp.Trailer)
	}
}

func TestProxyInterim(t *testing.T) {
	f := front(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</x>")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
		fmt.Fprint(w, "body")
	})
	var early http.Header
	ctx := httptrace.WithClientTrace(await.Context(t), &httptrace.ClientTrace{
		Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			early = http.Header(h)
			return nil
		},
	})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "body" || early.Get("Link") != "</x>" || resp.Header.Get("Link") != "" {
		t.Errorf("%q, %v; early: %v, then: %v", b, err, early, resp.Header)
	}
}

// TestProxyHead compares HEAD with GET.
func TestProxyHead(t *testing.T) {
	f := front(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100000")
		w.Header().Set("Date", "now")
		w.Header().Set("Content-Type", "x/y")
		_, _ = io.WriteString(w, strings.Repeat("x", 100000))
	})
	var heads [2]http.Header
	for i, method := range []string{http.MethodGet, http.MethodHead} {
		resp, body, err := ask(t, f, method, false)
		if err != nil || len(body) != 100000*(1-i) {
			t.Fatalf("%s: %d bytes, %v", method, len(body), err)
		}
		heads[i] = resp.Header
	}
	if !reflect.DeepEqual(heads[0], heads[1]) {
		t.Errorf("GET has %v, HEAD %v", heads[0], heads[1])
	}
}
