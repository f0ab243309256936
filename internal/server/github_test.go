package server_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"

	"github.com/google/uuid"
)

// oauthServer is a fake GitHub with one account. Like the real one, it checks redirect,
// challenge and code.
type oauthServer struct {
	*httptest.Server
	mu       sync.Mutex
	codes    map[string]string // code → challenge
	user     int
	email    string
	verified bool
}

func newOAuthServer(t testing.TB, callback string) *oauthServer {
	o := &oauthServer{codes: make(map[string]string), user: 7, email: "octo@example.com", verified: true}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /login/oauth/authorize", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("client_id") != "client" || q.Get("redirect_uri") != callback || q.Get("code_challenge_method") != "S256" || q.Get("response_type") != "code" || q.Get("state") == "" {
			http.Error(w, "bad request", 400)
			return
		}
		code := uuid.NewString()
		o.mu.Lock()
		o.codes[code] = q.Get("code_challenge")
		o.mu.Unlock()
		http.Redirect(w, r, callback+"?"+url.Values{"code": {code}, "state": {q.Get("state")}}.Encode(), http.StatusFound)
	})
	mux.HandleFunc("POST /login/oauth/access_token", func(w http.ResponseWriter, r *http.Request) {
		o.mu.Lock()
		challenge, ok := o.codes[r.FormValue("code")]
		delete(o.codes, r.FormValue("code"))
		o.mu.Unlock()
		sum := sha256.Sum256([]byte(r.FormValue("code_verifier")))
		w.Header().Set("Content-Type", "application/json")
		if !ok || r.FormValue("client_secret") != "secret" || base64.RawURLEncoding.EncodeToString(sum[:]) != challenge {
			json.NewEncoder(w).Encode(map[string]string{"error": "bad_verification_code"})
			return
		}
		json.NewEncoder(w).Encode(map[string]string{"access_token": "token-of-7", "token_type": "bearer"})
	})
	authorized := func(f func() any) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "Bearer token-of-7" {
				http.Error(w, "no", http.StatusUnauthorized)
				return
			}
			o.mu.Lock()
			defer o.mu.Unlock()
			json.NewEncoder(w).Encode(f())
		}
	}
	mux.HandleFunc("GET /user", authorized(func() any { return map[string]any{"id": o.user} }))
	mux.HandleFunc("GET /user/emails", authorized(func() any {
		return []map[string]any{{"email": "other@example.com", "primary": false, "verified": true}, {"email": o.email, "primary": true, "verified": o.verified}}
	}))
	o.Server = httptest.NewServer(mux)
	t.Cleanup(o.Close)
	return o
}

// withGitHub restarts the server with a fake GitHub.
func (p *plane) withGitHub() *oauthServer {
	p.Helper()
	o := newOAuthServer(p.TB, "http://localhost:8000/api/v1/auth/github/callback")
	p.end()
	p.config.GitHubClientID, p.config.GitHubClientSecret, p.config.GitHubURL, p.config.GitHubAPIURL = "client", "secret", o.URL, o.URL
	p.start()
	return o
}

// browse gets a page as a browser with these cookies does.
func (p *plane) browse(url string, cookies ...*http.Cookie) *http.Response {
	p.Helper()
	req, _ := http.NewRequest("GET", url, nil)
	for _, c := range cookies {
		req.AddCookie(c)
	}
	res, err := browser.Do(req)
	if err != nil {
		p.Fatal(err)
	}
	res.Body.Close()
	return res
}

// toGitHub goes to GitHub, and returns the query with which it redirects the browser
// back.
func (p *plane) toGitHub(start string, cookies ...*http.Cookie) (url.Values, *http.Cookie) {
	p.Helper()
	begun := p.browse(p.http.URL+start, cookies...)
	if begun.StatusCode != 302 {
		p.Fatalf("start: %s", begun.Status)
	}
	c := begun.Cookies()[0]
	if !c.HttpOnly || c.SameSite != http.SameSiteLaxMode {
		p.Errorf("cookie %+v", c)
	}
	back := p.browse(begun.Header.Get("Location"))
	u, err := url.Parse(back.Header.Get("Location"))
	if err != nil || back.StatusCode != 302 {
		p.Fatalf("GitHub: %s %v", back.Status, err)
	}
	return u.Query(), &http.Cookie{Name: c.Name, Value: c.Value}
}

func TestGitHub(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.call("GET", "/v1/auth/github", nil, nobody...).fails(404, "not_found")
	o := p.withGitHub()
	// login goes to GitHub and back; change may alter the callback.
	login := func(start string, change func(url.Values, *http.Cookie), cookies ...*http.Cookie) *http.Response {
		t.Helper()
		q, c := p.toGitHub(start, cookies...)
		if change != nil {
			change(q, c)
		}
		return p.browse(p.http.URL+"/v1/auth/github/callback?"+q.Encode(), c)
	}
	failed := func(res *http.Response, code string) {
		t.Helper()
		if got := res.Header.Get("Location"); got != "http://localhost:8000/?login_error="+code {
			t.Errorf("came back to %q, want the error %s", got, code)
		}
		for _, c := range res.Cookies() {
			if c.Value != "" {
				t.Errorf("a failed login set %v", c)
			}
		}
	}
	failed(login("/v1/auth/github", nil), "permission_denied") // Sign-up is closed.
	p.sql("UPDATE platform_settings SET signup_open = true")
	failed(login("/v1/auth/github", func(q url.Values, _ *http.Cookie) { q.Set("state", "other") }), "invalid_argument")
	failed(login("/v1/auth/github", func(_ url.Values, c *http.Cookie) { c.Value += "x" }), "invalid_argument")
	failed(login("/v1/auth/github", func(q url.Values, _ *http.Cookie) { q.Set("code", "other") }), "bad_gateway")
	failed(login("/v1/auth/github", func(q url.Values, _ *http.Cookie) { q.Del("code"); q.Set("error", "access_denied") }), "permission_denied")
	// A code from another browser does not match this one's verifier.
	var stolen string
	login("/v1/auth/github", func(q url.Values, _ *http.Cookie) { stolen = q.Get("code"); q.Set("state", "x") })
	failed(login("/v1/auth/github", func(q url.Values, _ *http.Cookie) { q.Set("code", stolen) }), "bad_gateway")
	o.mu.Lock()
	o.verified = false
	o.mu.Unlock()
	failed(login("/v1/auth/github", nil), "permission_denied")
	o.mu.Lock()
	o.verified = true
	o.mu.Unlock()

	var access string
	for range 2 { // The second login finds the same user.
		res := login("/v1/auth/github", nil)
		if res.Header.Get("Location") != "http://localhost:8000/" {
			t.Fatalf("came back to %q", res.Header.Get("Location"))
		}
		for _, c := range res.Cookies() {
			if c.Name == "wrenn_access" {
				access = c.Value
			}
		}
		me := p.call("GET", "/v1/me", nil, as(access)...).want(200).object()
		p.recorded(me["id"].(string), "finishGitHub ok")
		if me["email"] != "octo@example.com" || me["has_password"] != false || me["github"] != true {
			t.Errorf("me: %v", me)
		}
	}
	// A GitHub account with the email address of an account here is not linked to it.
	// Only the account's user can link it.
	o.mu.Lock()
	o.user, o.email = 8, "admin@example.com"
	o.mu.Unlock()
	failed(login("/v1/auth/github", nil), "conflict")
	res := login("/v1/auth/github?link=true", nil, &http.Cookie{Name: "wrenn_access", Value: p.bearerOf("admin@example.com")})
	if res.Header.Get("Location") != "http://localhost:8000/" {
		t.Errorf("link came back to %q", res.Header.Get("Location"))
	}
	for _, c := range login("/v1/auth/github", nil).Cookies() {
		if c.Name == "wrenn_access" {
			if me := p.call("GET", "/v1/me", nil, as(c.Value)...).want(200); me.str("email") != "admin@example.com" {
				t.Errorf("logged in as %s", me.Body)
			}
		}
	}
}
