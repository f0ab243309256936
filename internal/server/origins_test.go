package server_test

import (
	"context"
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

	"github.com/coder/websocket"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/filesign"
)

// signed returns the path of a URL that a client signed for reading a file.
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

// TestSignedURL checks that the server verifies a signature before it contacts a host.
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

// TestSignedURLOfPages checks that pages of other sites may use validly signed URLs and
// nothing else of a guest daemon, and that the server answers their preflights without
// the host.
func TestSignedURLOfPages(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	var reached atomic.Int64
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached.Add(1)
		w.Header().Set("Access-Control-Allow-Credentials", "true")
	})
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	daemon, port := "49983-"+made.str("id")+".localhost", "80-"+made.str("id")+".localhost"
	good, bad := signed("/a", made.str("access_token"), time.Now().Add(time.Hour)), "/files?path=/a&signature=v1_x"
	for _, tt := range []struct {
		name, method, host, path string
		header                   []string
		status                   int
		pages, reaches           bool
	}{
		{"a good one", "GET", daemon, good, nil, 200, true, true},
		{"a bad one", "GET", daemon, bad, nil, 401, false, false},
		{"with a token", "GET", daemon, "/files?path=/a", []string{"X-Access-Token", made.str("access_token")}, 200, false, true},
		{"with a token and a bad signature", "GET", daemon, bad, []string{"X-Access-Token", made.str("access_token")}, 200, false, true},
		{"preflight", "OPTIONS", daemon, good, []string{"Access-Control-Request-Method", "POST"}, 204, true, false},
		{"preflight of a bad one", "OPTIONS", daemon, bad, []string{"Access-Control-Request-Method", "GET"}, 204, true, false},
		{"preflight without a signature", "OPTIONS", daemon, "/files?path=/a", []string{"Access-Control-Request-Method", "GET"}, 401, false, false},
		{"preflight of another path", "OPTIONS", daemon, "/envs?signature=x", []string{"Access-Control-Request-Method", "GET"}, 401, false, false},
		{"preflight of another port", "OPTIONS", port, good, []string{"Access-Control-Request-Method", "GET"}, 401, false, false},
		{"no preflight", "OPTIONS", daemon, bad, nil, 401, false, false},
	} {
		before := reached.Load()
		r := p.call(tt.method, tt.path, nil, append([]string{"Host", tt.host, "X-API-Key", "", "Origin", "https://elsewhere.example"}, tt.header...)...)
		if r.Status != tt.status || (reached.Load() > before) != tt.reaches {
			t.Errorf("%s: %d, want %d; %d requests reached the host", tt.name, r.Status, tt.status, reached.Load()-before)
		}
		for name, value := range forPages {
			if !tt.pages {
				value = ""
			}
			if got := r.Header.Get(name); got != value {
				t.Errorf("%s: %s is %q, want %q", tt.name, name, got, value)
			}
		}
		if r.Header.Get("Access-Control-Allow-Credentials") != "" {
			t.Errorf("%s: cookies are allowed", tt.name)
		}
	}
}

// What a hostile guest daemon sends, and what clients get of it.
var (
	hostileFields = map[string]string{
		"Set-Cookie": "wrenn_access=evil; Domain=localhost", "Access-Control-Allow-Origin": "*", "Access-Control-Allow-Credentials": "true",
		"Content-Security-Policy": "default-src *", "X-Content-Type-Options": "sniff", "Refresh": "0; url=http://evil.example/", "Link": "</x>; rel=preload",
		"Clear-Site-Data": `"*"`, "Service-Worker-Allowed": "/", "Strict-Transport-Security": "max-age=9; includeSubDomains", "Location": "http://evil.example/",
		"Alt-Svc": `h2="evil.example:443"`, "Nel": "{}", "Report-To": "{}", "Reporting-Endpoints": `a="http://evil.example/"`, "Www-Authenticate": "Basic",
		"Proxy-Authenticate": "Basic", "X-Frame-Options": "ALLOWALL", "Content-Location": "/x", "Sourcemap": "/x", "X-New-Field": "of tomorrow", "Set-Login": "logged-in",
		"Timing-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin", "Origin-Agent-Cluster": "?0", "X-Wrenn-Error": "paused", "X-Request-Id": "forged", "Connection": "X-Content-Type-Options",
	}
	harmlessFields = map[string]string{
		"Content-Type": "text/html", "Content-Disposition": "inline", "Content-Encoding": "br", "Etag": `"x"`, "Cache-Control": "no-store",
		"Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT", "Grpc-Encoding": "gzip", "Connect-Content-Encoding": "gzip",
	}
)

// hostileDaemon responds as a hostile guest daemon might.
func hostileDaemon(w http.ResponseWriter, _ *http.Request) {
	h := w.Header()
	for name, value := range hostileFields {
		h.Set(name, value)
	}
	w.WriteHeader(http.StatusEarlyHints)
	for name, value := range harmlessFields {
		h.Set(name, value)
	}
	h.Set("Trailer", "Grpc-Status, Set-Cookie")
	w.WriteHeader(http.StatusFound)
	io.WriteString(w, "<script>")
	h.Set("Grpc-Status", "0")
	h.Set(http.TrailerPrefix+"Link", "</x>")
}

// withEarly returns a context for requests whose interim responses add their headers
// to early.
func withEarly(ctx context.Context, early *[]http.Header) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: func(_ int, h textproto.MIMEHeader) error {
		*early = append(*early, http.Header(h))
		return nil
	}})
}

// forPages are the headers that let pages of other sites read responses to signed URLs.
var forPages = map[string]string{
	"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "GET, HEAD, POST", "Access-Control-Allow-Headers": "Content-Type, Range",
	"Access-Control-Expose-Headers": "*", "Access-Control-Max-Age": "600",
}

// wantHarmless checks that a response of hostileDaemon is harmless.
func wantHarmless(t *testing.T, what string, signed bool, resp *http.Response, early []http.Header) {
	t.Helper()
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || string(body) != "<script>" || resp.StatusCode != http.StatusFound {
		t.Errorf("%s: %s %q, %v", what, resp.Status, body, err)
	}
	if len(early) != 1 || len(early[0]) != 0 {
		t.Errorf("%s: an interim response has %v", what, early)
	}
	if !maps.EqualFunc(resp.Trailer, http.Header{"Grpc-Status": {"0"}}, slices.Equal) {
		t.Errorf("%s: trailers %v", what, resp.Trailer)
	}
	if id := resp.Header.Values("X-Request-Id"); len(id) != 1 || len(id[0]) != 16 {
		t.Errorf("%s: the response has the ids %q", what, id)
	}
	resp.Header.Del("X-Request-Id")
	resp.Header.Del("Date")
	want := http.Header{
		"X-Content-Type-Options": {"nosniff"}, "Referrer-Policy": {"no-referrer"},
		"Content-Security-Policy": {"default-src 'none'; style-src 'unsafe-inline'; sandbox"},
	}
	for name, value := range harmlessFields {
		want.Set(name, value)
	}
	if signed {
		for name, value := range forPages {
			want.Set(name, value)
		}
	}
	if !maps.EqualFunc(resp.Header, want, slices.Equal) {
		t.Errorf("%s: the client got %v, want %v", what, resp.Header, want)
	}
}

// TestHostileDaemon checks that clients get only harmless headers from a hostile guest
// daemon, and that browsers run none of its responses.
func TestHostileDaemon(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	var saw atomic.Pointer[http.Header]
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		saw.Store(&r.Header)
		hostileDaemon(w, r)
	})
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	var early []http.Header
	ctx := withEarly(await.Context(t), &early)
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
		wantHarmless(t, name, strings.HasPrefix(name, "/files"), resp, early)
		if got := *saw.Load(); got.Get("Cookie") != "" || got.Get("Upgrade") != "" {
			t.Errorf("%s: the daemon got %v", name, got)
		}
	}
}

// TestGuestCookies checks that no guest gets the service's cookies or sets a cookie for
// any name but its own.
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
		if r.Header.Get("Upgrade") != "" {
			if ws, err := websocket.Accept(w, r, nil); err == nil {
				ws.CloseNow()
			}
			return
		}
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
	ws, resp, err := websocket.Dial(await.Context(t), p.http.URL+"/", &websocket.DialOptions{Host: host, HTTPHeader: http.Header{"X-Api-Key": {adminKey}, "Cookie": {"wrenn_access=x"}}})
	if err != nil {
		t.Fatal(err)
	}
	ws.CloseNow()
	if set := resp.Header["Set-Cookie"]; !slices.Equal(set, want) || resp.Header.Get("Clear-Site-Data") != "" || len(*got.Load()) > 0 {
		t.Errorf("with a WebSocket the client got %v, the guest %q", resp.Header, *got.Load())
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

// TestPlainHTTP checks that operations on accounts refuse plain HTTP, except at loopback
// names, and accept HTTPS that a front door on this machine reports.
func TestPlainHTTP(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	refused := func(method, path string, headers ...string) bool {
		t.Helper()
		r := p.call(method, path, "{}", append(slices.Clone(nobody), headers...)...)
		no := r.Status == http.StatusForbidden && strings.Contains(string(r.Body), "plain HTTP")
		if no && r.Header.Get("Set-Cookie") != "" {
			t.Errorf("%s %s sets a cookie", method, path)
		}
		if no && !strings.Contains(string(r.Body), "WRENN_INSECURE") {
			t.Errorf("%s %s does not say how to allow it", method, path)
		}
		return no
	}
	checked := 0
	for _, o := range operations(t) {
		account := o.Tags[0] == "login" || o.Tags[0] == "me"
		if account != (strings.HasPrefix(o.path, "/v1/auth/") || slices.Contains([]string{"/v1/me", "/v1/channel-confirmations", "/verify", "/reset-password", "/confirm-channel"}, o.path)) {
			t.Errorf("%s has the tag %s", o, o.Tags[0])
		}
		if !account {
			continue
		}
		checked++
		for _, tt := range []struct {
			host, proto string
			want        bool
		}{
			{"wrenn.example.com", "", true},
			{"192.0.2.1:8000", "http", true},
			{"localhost.example.com", "http", true},
			{"notlocalhost", "http", true},
			{"wrenn.example.com", "https", false},
			{"wrenn.example.com", "https, http", true},
			{"wrenn.example.com", "http, https", true},
			{"localhost:8000", "http", false},
			{"LOCALHOST.", "http", false},
			{"wrenn.localhost", "http", false},
			{"127.0.0.2:8000", "http", false},
			{"[::1]:8000", "http", false},
		} {
			if got := refused(o.method, o.path, "Host", tt.host, "X-Forwarded-Proto", tt.proto); got != tt.want {
				t.Errorf("%s at %s over %q: refused is %v", o, tt.host, tt.proto, got)
			}
		}
	}
	if checked < 12 {
		t.Errorf("only %d operations", checked)
	}
	p.call("GET", "/v1/sandboxes", nil, "Host", "wrenn.example.com").want(200)
	p.end()
	p.config.Insecure = true
	p.start()
	if refused("GET", "/verify", "Host", "wrenn.example.com") {
		t.Error("refused though the operator allows it")
	}
}

// TestHarmless checks that browsers use no response of the service as a page, a script or
// part of another origin's page, and that cookies count only for the service's own pages.
func TestHarmless(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	p.call("PUT", "/v1/sandboxes/"+sandbox+"/files?path=/evil.html", []byte("<script>")).want(200)
	for path, policy := range map[string]string{
		"/health": "sandbox", "/v1/nothing": "sandbox", "/v1/sandboxes": "sandbox", "/v1/sandboxes/" + sandbox + "/files?path=/evil.html": "sandbox",
		"/v1/sandboxes/" + sandbox + "/logs": "sandbox", "/docs": "frame-ancestors 'none'", "/verify": "frame-ancestors 'none'",
	} {
		h := p.call("GET", path, nil).Header
		if got := h.Get("Content-Security-Policy"); !strings.Contains(got, "default-src 'none'") || !strings.Contains(got, policy) || !strings.Contains(got, "frame-ancestors 'none'") {
			t.Errorf("%s: policy %q", path, got)
		}
		if h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Cross-Origin-Resource-Policy") != "same-origin" || h.Get("Referrer-Policy") != "no-referrer" {
			t.Errorf("%s: %v", path, h)
		}
	}
	p.call("GET", "/", nil, "Host", "80-cl-x.localhost").fails(400, "invalid_argument")
	cookie := append(slices.Clone(nobody), "Cookie", "wrenn_access="+p.bearerOf("admin@example.com"))
	for _, tt := range []struct {
		site, mode, dest string
		want             int
	}{
		{"", "", "", 200},
		{"same-origin", "cors", "empty", 200},
		{"none", "navigate", "document", 200},
		{"same-site", "navigate", "document", 200},
		{"same-site", "navigate", "iframe", 401},
		{"same-site", "no-cors", "script", 401},
		{"same-site", "cors", "empty", 401},
		{"cross-site", "no-cors", "image", 401},
	} {
		if r := p.call("GET", "/v1/me", nil, append(slices.Clone(cookie), "Sec-Fetch-Site", tt.site, "Sec-Fetch-Mode", tt.mode, "Sec-Fetch-Dest", tt.dest)...); r.Status != tt.want {
			t.Errorf("%v: %d", tt, r.Status)
		}
	}
}

// TestSandboxDomain checks that with a domain of their own, sandboxes are only below it,
// and nothing else is.
func TestSandboxDomain(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.agent.guest = guestHandler()
	p.end()
	p.config.Domain, p.config.SandboxDomain, p.config.PublicURL = "wrenn.example.com", "Sandboxes.Example.NET", "https://wrenn.example.com:8443"
	p.start()
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	sandbox := made.str("id")
	if got, want := made.str("url"), "https://{port}-"+sandbox+".sandboxes.example.net:8443"; got != want {
		t.Errorf("url %s, want %s", got, want)
	}
	for host, want := range map[string]int{
		"80-" + sandbox + ".sandboxes.example.net:8443": 418,
		"80-" + sandbox + ".SANDBOXES.example.net.":     418,
		"80-" + sandbox + ".wrenn.example.com":          404,
		"80-" + sandbox + ".x.sandboxes.example.net":    404,
		"sandboxes.example.net":                         404,
		"www.sandboxes.example.net":                     404,
		"a.b.sandboxes.example.net":                     404,
		"80-cl-x.sandboxes.example.net":                 400,
		"wrenn.example.com":                             200,
		"notsandboxes.example.net":                      200,
	} {
		if r := p.call("GET", "/docs", nil, "Host", host); r.Status != want {
			t.Errorf("%s: %d, want %d: %.200s", host, r.Status, want, r.Body)
		}
	}
	// Over HTTPS the server binds cookies to its host, and removes older ones.
	r := p.call("POST", "/v1/auth/login", map[string]any{"email": "admin@example.com", "password": "correct horse"}, nobody...).want(200)
	var jar []string
	gone := make(map[string]bool)
	for _, c := range (&http.Response{Header: r.Header}).Cookies() {
		if c.MaxAge < 0 {
			gone[c.Name] = true
			continue
		}
		if !strings.HasPrefix(c.Name, "__Host-wrenn_") || !c.Secure || !c.HttpOnly || c.Path != "/" || c.Domain != "" {
			t.Errorf("cookie %+v", c)
		}
		jar = append(jar, c.Name+"="+c.Value)
	}
	if len(jar) != 2 || !maps.Equal(gone, map[string]bool{"wrenn_access": true, "wrenn_refresh": true}) {
		t.Errorf("cookies %q, removed %v", jar, gone)
	}
	show := func(cookies ...string) []string {
		return append(slices.Clone(nobody), "Cookie", strings.Join(cookies, "; "))
	}
	p.call("GET", "/v1/me", nil, show(jar...)...).want(200)
	p.call("GET", "/v1/me", nil, show(append([]string{"wrenn_access=evil"}, jar...)...)...).want(200)
	var former []string
	for _, c := range jar {
		former = append(former, strings.TrimPrefix(c, "__Host-"))
	}
	p.call("GET", "/v1/me", nil, show(former...)...).fails(401, "unauthenticated")
	p.call("POST", "/v1/auth/refresh", nil, append(show(former...), "Origin", "https://wrenn.example.com:8443")...).fails(401, "unauthenticated")
}
