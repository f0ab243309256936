package github

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// TestCallsPublicAddresses checks that github.com is never called at a private address,
// whatever DNS and redirects say, and no site at an address that is always refused.
func TestCallsPublicAddresses(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/redirect" {
			http.Redirect(w, r, "http://169.254.169.254/latest/meta-data", http.StatusFound)
		}
	}))
	defer srv.Close()
	for _, c := range []struct {
		config  Config
		path    string
		allowed bool
	}{
		{Config{}, "/", false},
		{Config{URL: srv.URL}, "/", true},
		{Config{APIURL: srv.URL}, "/", true},
		{Config{URL: srv.URL, APIURL: srv.URL}, "/redirect", false},
	} {
		resp, err := New(c.config).http.Get(srv.URL + c.path)
		if err == nil {
			resp.Body.Close()
		}
		if (err == nil) != c.allowed || err != nil && !errors.Is(err, netaddr.ErrNotAllowed) {
			t.Errorf("%+v, %s: %v", c.config, c.path, err)
		}
	}
}
