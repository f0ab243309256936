package client

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
)

// TestRedirects checks that a service cannot redirect the client to another one, which
// would get the key, the session or the password.
func TestRedirects(t *testing.T) {
	var asked atomic.Int64
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer other.Close()
	for _, status := range []int{301, 302, 303, 307, 308} {
		service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL+r.URL.Path, status)
		}))
		for _, o := range [][]Option{{}, {WithSession("wra_x")}, {WithHTTPClient(&http.Client{})}} {
			c, err := New(service.URL, "wrn_x", o...)
			if err != nil {
				t.Fatal(err)
			}
			_, get := c.Get(t.Context(), "cl-x")
			_, login := c.LogIn(t.Context(), "a@example.com", "secret")
			_, exec := c.ExecStream(t.Context(), "cl-x", Stream{Command: Command{Cmd: "true"}})
			for _, err := range []error{get, login} {
				if err == nil || !strings.Contains(err.Error(), other.URL) {
					t.Errorf("%d: the error is %v, want one with the other URL", status, err)
				}
			}
			if exec == nil {
				t.Errorf("%d: a stream succeeded", status)
			}
		}
		service.Close()
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("the other service got %d requests", n)
	}
}

// TestGuestsRedirects checks that a guest cannot redirect its clients to the API with
// their API key, while redirects at its own name keep the key.
func TestGuestsRedirects(t *testing.T) {
	type arrival struct{ host, path, key string }
	var got []arrival
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = append(got, arrival{r.Host, r.URL.Path, r.Header.Get("X-API-Key")})
		to := map[string]string{"/": "/own", "/own": "http://api.test/one", "/one": "http://api.test/two"}[r.URL.Path]
		if to != "" {
			http.Redirect(w, r, to, http.StatusTemporaryRedirect)
		}
	}))
	defer service.Close()
	c, err := New(service.URL, "wrn_x")
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: c.Transport()}).Post("http://80-cl-x.test/", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	want := []arrival{{"80-cl-x.test", "/", "wrn_x"}, {"80-cl-x.test", "/own", "wrn_x"}, {"api.test", "/one", ""}, {"api.test", "/two", ""}}
	if len(got) != len(want) {
		t.Fatalf("the service got %v", got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("request %d is %v, want %v", i, got[i], want[i])
		}
	}
}
