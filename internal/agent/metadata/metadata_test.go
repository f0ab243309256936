package metadata

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

func document(t testing.TB) *Server {
	t.Helper()
	s := New()
	err := s.Set(map[string]any{
		"sandbox_id":  "cl-1",
		"template_id": "tpl-2",
		"env":         map[string]string{"A": "b", "with/slash": "c", "": "empty"},
		"n":           12345678901234567,
		"list":        []any{"x", map[string]any{"k": "v"}},
		"deep":        map[string]any{"er": map[string]any{"leaf": "<&>"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func ask(s *Server, method, path string, headers ...string) (int, string, http.Header) {
	r := httptest.NewRequest(method, path, nil)
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		r.Header.Set(k, v)
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w.Code, w.Body.String(), w.Header()
}

func newToken(t testing.TB, s *Server) string {
	t.Helper()
	code, token, h := ask(s, "PUT", tokenPath, "X-metadata-token-ttl-seconds: 60")
	if code != 200 || token == "" || h.Get("Content-Type") != "text/plain" {
		t.Fatalf("no token: %d %q %v", code, token, h)
	}
	return token
}

func TestToken(t *testing.T) {
	s := document(t)
	for ttl, want := range map[string]int{
		"1": 200, "21600": 200, "0": 400, "21601": 400, "-1": 400, "x": 400, "": 400, "1.5": 400, "99999999999999999999": 400,
	} {
		for _, header := range []string{"X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"} {
			if code, _, _ := ask(s, "PUT", tokenPath, header+": "+ttl); code != want {
				t.Errorf("%s %q: %d, not %d", header, ttl, code, want)
			}
		}
	}
	if code, _, _ := ask(s, "PUT", tokenPath); code != 400 {
		t.Errorf("a token without a lifetime: %d", code)
	}
	if code, _, _ := ask(s, "PUT", tokenPath, "X-metadata-token-ttl-seconds: 60", "X-Forwarded-For: 1.2.3.4"); code != 400 {
		t.Errorf("a forwarded request: %d", code)
	}
	if code, _, _ := ask(s, "PUT", "/sandbox_id", "X-metadata-token-ttl-seconds: 60"); code != 404 {
		t.Errorf("PUT to another path: %d", code)
	}

	token := newToken(t, s)
	for _, header := range []string{"X-metadata-token", "X-aws-ec2-metadata-token"} {
		if code, got, _ := ask(s, "GET", "/sandbox_id", header+": "+token); code != 200 || got != "cl-1" {
			t.Errorf("%s: %d %q", header, code, got)
		}
	}
	changed := []byte(token)
	changed[3] ^= 1
	for name, bad := range map[string]string{
		"none": "", "junk": "junk", "changed": string(changed), "cut": token[:len(token)-4],
		"another server's": newToken(t, document(t)),
		"expired":          s.token(time.Now().Add(-time.Millisecond)),
	} {
		if code, _, _ := ask(s, "GET", "/sandbox_id", "X-metadata-token: "+bad); code != 401 {
			t.Errorf("token %s: %d", name, code)
		}
	}
	for _, method := range []string{"POST", "DELETE", "HEAD", "PATCH"} {
		code, _, h := ask(s, method, "/sandbox_id", "X-metadata-token: "+token)
		if code != 405 || h.Get("Allow") != "GET, PUT" {
			t.Errorf("%s: %d, allow %q", method, code, h.Get("Allow"))
		}
	}
}

func TestDocument(t *testing.T) {
	s := document(t)
	auth := "X-metadata-token: " + newToken(t, s)
	for _, c := range []struct {
		path, accept string
		code         int
		body         string
	}{
		{"/", "", 200, "deep/\nenv/\nlist\nn\nsandbox_id\ntemplate_id"},
		{"/sandbox_id", "", 200, "cl-1"},
		{"/sandbox_id", "*/*", 200, "cl-1"},
		{"/sandbox_id", "plain/text", 200, "cl-1"},
		{"/sandbox_id", "application/json", 200, "\"cl-1\"\n"},
		{"/sandbox_id", "application/json, */*", 200, "\"cl-1\"\n"},
		{"/sandbox_id", "image/png", 406, ""},
		{"/env/A", "", 200, "b"},
		{"/env/", "", 200, "\nA\nwith/slash"},
		{"//env//A/", "", 200, "b"},
		{"/env/with~1slash", "", 200, "c"},
		{"/env", "application/json", 200, `{"":"empty","A":"b","with/slash":"c"}` + "\n"},
		{"/deep/er/leaf", "", 200, "<&>"},
		{"/n", "", 501, ""},
		{"/n", "application/json", 200, "12345678901234567\n"},
		{"/list", "", 501, ""},
		{"/list/1/k", "", 200, "v"},
		{"/list/2", "", 404, ""},
		{"/list/-1", "", 404, ""},
		{"/nothing", "", 404, ""},
		{"/sandbox_id/deeper", "", 404, ""},
		{"/../etc/passwd", "", 404, ""},
	} {
		headers := []string{auth}
		if c.accept != "" {
			headers = append(headers, "Accept: "+c.accept)
		}
		code, body, _ := ask(s, "GET", c.path, headers...)
		if code != c.code || code == 200 && body != c.body {
			t.Errorf("%s as %q: %d %q, not %d %q", c.path, c.accept, code, body, c.code, c.body)
		}
	}
}

func TestSet(t *testing.T) {
	s := New()
	auth := "X-metadata-token: " + newToken(t, s)
	if code, _, _ := ask(s, "GET", "/", auth); code != 404 {
		t.Errorf("without a document: %d", code)
	}
	for _, bad := range []any{nil, "text", 1, []int{1}, func() {}} {
		if err := s.Set(bad); err == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
	for _, id := range []string{"one", "two"} {
		if err := s.Set(struct {
			ID string `json:"sandbox_id"`
		}{id}); err != nil {
			t.Fatal(err)
		}
		if _, got, _ := ask(s, "GET", "/sandbox_id", auth); got != id {
			t.Errorf("%q, not %q", got, id)
		}
	}
}

func TestServeLimitsConnections(t *testing.T) {
	s := document(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	// Open as many silent connections as the server serves at once. One more must wait.
	var idle []net.Conn
	for range maxConnections {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		idle = append(idle, c)
	}
	ctx := await.Context(t)
	req, _ := http.NewRequestWithContext(ctx, "PUT", fmt.Sprintf("http://%s%s", l.Addr(), tokenPath), nil)
	req.Header.Set("X-metadata-token-ttl-seconds", "60")
	req = req.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteRequest: func(httptrace.WroteRequestInfo) { idle[0].Close() },
	}))
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, res.Body)
	res.Body.Close()
	if res.StatusCode != 200 {
		t.Errorf("%s", res.Status)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func FuzzGet(f *testing.F) {
	s := document(f)
	token := newToken(f, s)
	f.Add("/env/A", token, "application/json")
	f.Add("/~0~1", "", "*/*")
	f.Fuzz(func(t *testing.T, path, tok, accept string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.URL.Path = path
		r.Header.Set("X-Metadata-Token", tok)
		r.Header.Set("Accept", accept)
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if w.Code == 200 && tok != token {
			t.Errorf("token %q was accepted", tok)
		}
	})
}
