package enroll

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/pki"
)

// plane is the control plane's side of enrollment, with the real one's rules for refresh
// tokens.
type plane struct {
	*httptest.Server
	ca   *pki.Authority
	host uuid.UUID

	mu                sync.Mutex
	current, previous string // hashes of refresh tokens
	lose              int    // how many responses get lost from now on
	refuse            bool
	hold              func() // called in a refresh, without the lock, if set
	beats             []heartbeat
	news              chan struct{}
	registered        int
	every             time.Duration // between heartbeats
}

func newPlane(t *testing.T) *plane {
	ca, err := pki.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	p := &plane{ca: ca, host: uuid.New(), news: make(chan struct{}, 100), every: 10 * time.Millisecond}
	p.Server = httptest.NewServer(http.HandlerFunc(p.serve))
	t.Cleanup(p.Close)
	return p
}

func (p *plane) serve(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if hold := p.hold; hold != nil && r.URL.Path == "/v1/hosts/refresh" {
		p.mu.Unlock()
		hold()
		p.mu.Lock()
	}
	var m struct {
		heartbeat
		Token   string `json:"token"`
		URL     string `json:"url"`
		Hash    string `json:"refresh_hash"`
		Refresh string `json:"refresh_token"`
		Next    string `json:"next_hash"`
		CSR     string `json:"csr"`
	}
	if err := json.NewDecoder(r.Body).Decode(&m); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	refuse := func(why string) {
		w.WriteHeader(http.StatusUnauthorized)
		json.NewEncoder(w).Encode(map[string]any{"error": map[string]string{"code": "unauthenticated", "message": why}})
	}
	switch r.URL.Path {
	case "/v1/hosts/register":
		if m.Token != "good" || p.registered > 0 && p.current != m.Hash {
			refuse("registration token")
			return
		}
		p.registered++
		p.current = m.Hash
	case "/v1/hosts/refresh":
		shown := hash(m.Refresh)
		switch {
		case p.refuse:
			refuse("revoked")
			return
		case shown == p.current:
			p.previous, p.current = p.current, m.Next
		case shown == p.previous && p.current == m.Next:
		default:
			refuse("refresh token")
			return
		}
	case "/v1/hosts/heartbeat":
		if r.Header.Get("Authorization") != "Bearer jwt" {
			refuse("token")
			return
		}
		p.beats = append(p.beats, m.heartbeat)
		p.news <- struct{}{}
		json.NewEncoder(w).Encode(map[string]any{"heartbeat_ms": p.every.Milliseconds()})
		return
	}
	if p.lose > 0 {
		p.lose--
		panic(http.ErrAbortHandler)
	}
	a := answer{HostID: "hst-1", Token: "jwt", ExpiresAt: time.Now().Add(time.Hour), AgentToken: "agent-token", HeartbeatMS: p.every.Milliseconds()}
	if m.CSR != "" {
		leaf, _, err := p.ca.SignHost([]byte(m.CSR), p.host, "127.0.0.1")
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		a.Certificate, a.Authority = string(leaf), string(p.ca.PEM())
	}
	json.NewEncoder(w).Encode(a)
}

func (p *plane) config(t *testing.T, dir, token string) Config {
	return Config{Dir: layout.Dir(dir), Server: p.URL, Token: token, URL: "https://127.0.0.1:7070", Log: slog.New(slog.DiscardHandler)}
}

func TestEnrollment(t *testing.T) {
	p := newPlane(t)
	ctx := context.Background()
	dir := t.TempDir()
	if _, err := Open(ctx, p.config(t, dir, ""), Status{}); err == nil {
		t.Error("registered without a token")
	}
	if _, err := Open(ctx, p.config(t, dir, "bad"), Status{}); err == nil {
		t.Error("registered with a bad token")
	}
	p.lose = 1
	if _, err := Open(ctx, p.config(t, dir, "good"), Status{}); err == nil {
		t.Error("it succeeded without a response")
	}
	h, err := Open(ctx, p.config(t, dir, "good"), Status{})
	if err != nil {
		t.Fatalf("the second attempt: %v", err)
	}
	if h.ID() != "hst-1" || h.AgentToken() != "agent-token" || h.TLS() == nil || p.registered != 2 {
		t.Errorf("%s, %s, %d", h.ID(), h.AgentToken(), p.registered)
	}
	if left := time.Until(h.listen.NotAfter()); left < pki.HostLasts-time.Minute {
		t.Errorf("the certificate holds for %v", left)
	}
	path := layout.Dir(dir).Enrollment()
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if others, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(others) != 1 {
		t.Errorf("left %v", others)
	}
	// The next agent needs neither a token nor the control plane.
	p.mu.Lock()
	p.refuse = true
	p.mu.Unlock()
	if h, err = Open(ctx, p.config(t, dir, ""), Status{}); err != nil || h.TLS() == nil {
		t.Fatalf("the next agent: %v", err)
	}
	p.mu.Lock()
	p.refuse = false
	p.mu.Unlock()

	// Responses get lost; each time, another agent continues with the stored state.
	for i := range 6 {
		p.mu.Lock()
		p.lose = i % 3
		p.mu.Unlock()
		for try := 0; ; try++ {
			if h, err = Open(ctx, p.config(t, dir, ""), Status{}); err != nil {
				t.Fatal(err)
			}
			if err = h.refresh(ctx); err == nil {
				break
			}
			if try >= 3 {
				t.Fatalf("refresh: %v", err)
			}
		}
	}
	first := h.listen.NotAfter()
	if err := h.refresh(ctx); err != nil || h.listen.NotAfter().Before(first) {
		t.Errorf("%v; the certificate holds until %v, before that until %v", err, h.listen.NotAfter(), first)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "good") {
		t.Error("the registration token was kept")
	}
}

func TestRun(t *testing.T) {
	p := newPlane(t)
	dir := t.TempDir()
	c := p.config(t, dir, "good")
	if _, err := Open(t.Context(), c, Status{}); err != nil {
		t.Fatal(err)
	}
	h, err := Open(t.Context(), c, Status{}) // without a host token yet
	if err != nil {
		t.Fatal(err)
	}
	before := p.current
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx, func() (Status, error) { return Status{CPUs: 7}, nil }) }()
	for range 3 {
		<-p.news
	}
	// The token becomes invalid early: the agent gets another.
	h.mu.Lock()
	h.token = "void"
	h.mu.Unlock()
	for range 3 {
		<-p.news
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	last := p.beats[len(p.beats)-1]
	if !last.Leaving || p.beats[0].Status == nil || p.beats[0].Status.CPUs != 7 {
		t.Errorf("first %+v, last %+v", p.beats[0], last)
	}
	if p.current == before {
		t.Error("the refresh token is the one from before")
	}
}

// TestRenewalBesideHeartbeats makes a renewal hang, and then fail, while the token is
// valid: heartbeats continue, and reading the host's identity does not block.
func TestRenewalBesideHeartbeats(t *testing.T) {
	p := newPlane(t)
	h, err := Open(t.Context(), p.config(t, t.TempDir(), "good"), Status{})
	if err != nil {
		t.Fatal(err)
	}
	began, let := make(chan struct{}), make(chan struct{})
	p.mu.Lock()
	p.refuse = true
	p.hold = func() {
		select {
		case began <- struct{}{}:
		case <-let:
		}
		<-let
	}
	p.mu.Unlock()
	h.mu.Lock()
	h.expires = time.Now().Add(refreshBefore / 2)
	h.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx, func() (Status, error) { return Status{}, nil }) }()
	beats := func(n int) {
		t.Helper()
		for range n {
			select {
			case <-p.news:
			case <-time.After(time.Minute):
				t.Fatal("no heartbeat")
			}
		}
	}
	<-began
	beats(5)
	if h.ID() != "hst-1" || h.AgentToken() != "agent-token" {
		t.Error("the host lost its identity")
	}
	close(let)
	beats(5)
	// It renews the token when the control plane works again.
	p.mu.Lock()
	p.refuse = false
	p.mu.Unlock()
	for deadline := time.Now().Add(time.Minute); ; beats(1) {
		h.mu.Lock()
		fresh := time.Until(h.expires) > refreshBefore
		h.mu.Unlock()
		if fresh {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the credentials were not renewed")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestRefused(t *testing.T) {
	for _, tt := range []struct{ server, url string }{
		{"http://control.example", "https://127.0.0.1:7070"},
		{"ftp://127.0.0.1", "https://127.0.0.1:7070"},
		{"", "https://127.0.0.1:7070"},
		{"http://127.0.0.1:1", "http://192.0.2.1:7070"},
		{"http://127.0.0.1:1", "https://0.0.0.0:7070"},
		{"http://127.0.0.1:1", "https://[::]:7070"},
		{"http://127.0.0.1:1", "127.0.0.1:7070"},
		{"http://127.0.0.1:1", "https://127.0.0.1"},
	} {
		_, err := Open(t.Context(), Config{Dir: layout.Dir(t.TempDir()), Server: tt.server, URL: tt.url, Token: "good"}, Status{})
		var refused *Error
		if err == nil || errors.As(err, &refused) || strings.Contains(err.Error(), "connect") {
			t.Errorf("server %q, agent %q: %v", tt.server, tt.url, err)
		}
	}
}
