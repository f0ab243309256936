package server_test

import (
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/filesign"
)

// signed is the path of a URL that a client signed to read a file.
func signed(path, access string, expires time.Time) string {
	v := url.Values{"path": {path}, "username": {"root"}}
	expiration := ""
	if !expires.IsZero() {
		expiration = strconv.FormatInt(expires.Unix(), 10)
		v.Set("signature_expiration", expiration)
	}
	v.Set("signature", filesign.Of(path, "read", "root", access, expiration))
	return filesign.Path + "?" + v.Encode()
}

// TestSignedURL: a signature is checked before anything of a request reaches a host.
func TestSignedURL(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	var reached atomic.Int64
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached.Add(1)
		w.WriteHeader(http.StatusTeapot)
	})
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	sandbox, access := made.str("id"), made.str("access_token")
	other := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	hour := time.Now().Add(time.Hour)
	good := signed("/a b", access, hour)
	for _, tt := range []struct {
		name, method, path string
		want               int
	}{
		{"good", "GET", good, 418},
		{"good, for ever", "GET", signed("/a b", access, time.Time{}), 418},
		{"head", "HEAD", good, 418},
		{"none", "GET", "/files?path=/a", 401},
		{"empty", "GET", "/files?path=/a&signature=", 401},
		{"made up", "GET", "/files?path=/a&signature=v1_x", 401},
		{"of another file", "GET", strings.Replace(good, "a+b", "a+c", 1), 401},
		{"of another user", "GET", strings.Replace(good, "username=root", "username=user", 1), 401},
		{"of another sandbox", "GET", signed("/a b", other.str("access_token"), hour), 401},
		{"with the traffic token", "GET", signed("/a b", made.str("traffic_token"), hour), 401},
		{"to read, and writes", "POST", good, 401},
		{"expired", "GET", signed("/a b", access, time.Now().Add(-time.Hour)), 401},
		{"prolonged", "GET", strings.Replace(good, strconv.FormatInt(hour.Unix(), 10), "4102444800", 1), 401},
		{"two files", "GET", good + "&path=/etc/shadow", 401},
		{"two signatures", "GET", "/files?signature=v1_x&" + strings.TrimPrefix(good, "/files?"), 401},
		{"malformed query", "GET", good + "&x=%zz", 400},
		{"another path", "GET", strings.Replace(good, "/files", "/envs", 1), 401},
		{"a path below", "GET", strings.Replace(good, "/files", "/files/", 1), 401},
	} {
		before := reached.Load()
		r := p.call(tt.method, tt.path, nil, "Host", "49983-"+sandbox+".localhost", "X-API-Key", "")
		if got := reached.Load() - before; r.Status != tt.want || (got == 1) != (tt.want == 418) {
			t.Errorf("%s: %d, want %d, and %d requests reached the host: %s", tt.name, r.Status, tt.want, got, r.Body)
		}
	}
}

// TestHostileDaemon: of what a hostile guest daemon answers, clients get a list of
// harmless fields, and browsers run none of it.
func TestHostileDaemon(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	hostile := map[string]string{
		"Set-Cookie": "wrenn_access=evil; Domain=localhost", "Access-Control-Allow-Origin": "*", "Access-Control-Allow-Credentials": "true",
		"Content-Security-Policy": "default-src *", "X-Content-Type-Options": "sniff", "Refresh": "0; url=http://evil.example/", "Link": "</x>; rel=preload",
		"Clear-Site-Data": `"*"`, "Service-Worker-Allowed": "/", "Strict-Transport-Security": "max-age=9; includeSubDomains", "Location": "http://evil.example/",
		"Alt-Svc": `h2="evil.example:443"`, "Nel": "{}", "Report-To": "{}", "Reporting-Endpoints": `a="http://evil.example/"`, "Www-Authenticate": "Basic",
		"Proxy-Authenticate": "Basic", "X-Frame-Options": "ALLOWALL", "Content-Location": "/x", "Sourcemap": "/x", "X-New-Field": "of tomorrow", "Set-Login": "logged-in",
		"Timing-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin", "Origin-Agent-Cluster": "?0", "X-Wrenn-Error": "paused", "Connection": "X-Content-Type-Options",
	}
	kept := map[string]string{
		"Content-Type": "text/html", "Content-Disposition": "inline", "Content-Encoding": "br", "Etag": `"x"`, "Cache-Control": "no-store",
		"Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT", "Grpc-Encoding": "gzip", "Connect-Content-Encoding": "gzip",
	}
	var saw atomic.Pointer[http.Header]
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		saw.Store(&r.Header)
		h := w.Header()
		for name, value := range hostile {
			h.Set(name, value)
		}
		w.WriteHeader(http.StatusEarlyHints)
		for name, value := range kept {
			h.Set(name, value)
		}
		h.Set("Trailer", "Grpc-Status, Set-Cookie")
		w.WriteHeader(http.StatusFound)
		io.WriteString(w, "<script>")
		h.Set("Grpc-Status", "0")
		h.Set(http.TrailerPrefix+"Link", "</x>")
	})
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	var early []http.Header
	ctx := httptrace.WithClientTrace(await.Context(t), &httptrace.ClientTrace{Got1xxResponse: func(_ int, h textproto.MIMEHeader) error {
		early = append(early, http.Header(h))
		return nil
	}})
	for name, header := range map[string]http.Header{
		"/health": {"X-Access-Token": {made.str("access_token")}},
		"/ws":     {"X-Access-Token": {made.str("access_token")}, "Connection": {"Upgrade"}, "Upgrade": {"websocket"}},
		signed("/a", made.str("access_token"), time.Time{}): {},
	} {
		header.Set("Cookie", "a=b; wrenn_access=secret")
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.http.URL+name, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host, req.Header = "49983-"+made.str("id")+".localhost", header
		early = nil
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(body) != "<script>" || resp.StatusCode != http.StatusFound {
			t.Errorf("%s: %s %q, %v", name, resp.Status, body, err)
		}
		if len(early) != 1 || len(early[0]) != 0 {
			t.Errorf("%s: an interim response has %v", name, early)
		}
		if !maps.EqualFunc(resp.Trailer, http.Header{"Grpc-Status": {"0"}}, slices.Equal) {
			t.Errorf("%s: trailers %v", name, resp.Trailer)
		}
		resp.Header.Del("Date")
		want := make(http.Header)
		for name, value := range kept {
			want.Set(name, value)
		}
		want.Set("X-Content-Type-Options", "nosniff")
		want.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; sandbox")
		want.Set("Referrer-Policy", "no-referrer")
		if !maps.EqualFunc(resp.Header, want, slices.Equal) {
			t.Errorf("%s: the client got %v, want %v", name, resp.Header, want)
		}
		if got := *saw.Load(); got.Get("Cookie") != "" || got.Get("Upgrade") != "" {
			t.Errorf("%s: the daemon got %v", name, got)
		}
	}
}

// TestGuestCookies: no guest gets the service's cookies, or sets one for another
// name than its own.
func TestGuestCookies(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	host := "80-" + sandbox + ".localhost"
	cookies := map[string]string{
		"a=b":                            "a=b",
		"a=b; Path=/; Secure":            "a=b; Path=/; Secure",
		"a=b; Domain=localhost; Path=/x": "a=b; Path=/x",
		"a=b;domain = .LOCALHOST":        "a=b",
		"a=b; Domain=" + host:            "a=b; Domain=" + host,
		"a=b; Domain=." + strings.ToUpper(host) + "; Domain=localhost": "a=b; Domain=." + strings.ToUpper(host),
		"a=b; Domain=81-" + sandbox + ".localhost":                     "a=b",
		"a=b; Domain":                                    "a=b",
		"a=b;\tDomain=localhost\t;HttpOnly":              "a=b;HttpOnly",
		"a=\"; Domain=localhost; \"":                     "a=\"; \"",
		"Domain=localhost":                               "Domain=localhost", // a cookie of that name
		"wrenn_access=x; Domain=localhost; Max-Age=9999": "wrenn_access=x; Max-Age=9999",
	}
	var sent, got atomic.Pointer[[]string]
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got.Store(new(r.Header.Values("Cookie")))
		for name, value := range map[string]string{"Clear-Site-Data": `"cookies"`, "Alt-Svc": `h2=":444"`, "Set-Cookie2": "a=b", "Access-Control-Allow-Origin": "*", "Location": "/x", "X-Own": "kept"} {
			w.Header().Set(name, value)
		}
		w.Header()["Set-Cookie"] = *sent.Load()
		w.WriteHeader(http.StatusTeapot)
	})
	all := slices.Sorted(maps.Keys(cookies))
	var want []string
	for _, c := range all {
		want = append(want, cookies[c])
	}
	sent.Store(&all)
	r := p.call("GET", "/", nil, "Host", host+":8000").want(418)
	if set := r.Header["Set-Cookie"]; !slices.Equal(set, want) {
		t.Errorf("the client got cookies\n%q, want\n%q", set, want)
	}
	for name, want := range map[string]string{"Clear-Site-Data": "", "Alt-Svc": "", "Set-Cookie2": "", "Access-Control-Allow-Origin": "*", "Location": "/x", "X-Own": "kept"} {
		if got := r.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	for shown, want := range map[string][]string{
		"a=b": {"a=b"}, "a=b; c=\"d; e\"": {"a=b; c=\"d; e\""},
		"wrenn_access=x": nil, "__Host-wrenn_refresh=x": nil, "__HOST-WRENN_access=x; wrenn_github=y": nil,
		"wrenn_access=x; a=b;wrenn_refresh=y;c=d; __Host-wrenn_access=z": {"a=b;c=d"},
		"my_wrenn_access=x": {"my_wrenn_access=x"}, "wrenn_access": nil,
	} {
		p.call("GET", "/", nil, "Host", host, "Cookie", shown).want(418)
		if seen := *got.Load(); !slices.Equal(seen, want) {
			t.Errorf("of %q the guest got %q, want %q", shown, seen, want)
		}
	}
}
