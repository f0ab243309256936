// Package enroll makes a machine a host of a control plane. It registers the host with
// an admin's token, keeps the host's credentials, renews them in time, and sends
// heartbeats.
//
// The private key of the host's certificate never leaves the host. The agent makes
// refresh tokens itself, and stores each before it sends the control plane its hash. So
// every call is idempotent, whichever process is killed at whatever point.
package enroll

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/backoff"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/pki"
)

const (
	// callTimeout bounds one call of the control plane.
	callTimeout = 15 * time.Second
	// leavingTimeout bounds the last heartbeat, which says that the agent is leaving.
	leavingTimeout = 3 * time.Second
	// maxAnswer bounds a response of the control plane, in bytes.
	maxAnswer = 1 << 20
	// maxPause is the longest backoff.
	maxPause = 30 * time.Second
)

// Config configures a [Host].
type Config struct {
	// Dir is the data directory, which has the credentials.
	Dir layout.Dir
	// Server is the control plane's URL. Plain HTTP is allowed only on this machine,
	// because the requests contain secrets.
	Server string
	// Token is the registration token. Only the first registration needs it.
	Token string
	// URL is the agent's URL for the control plane: "https://address:port", or on this
	// machine, without a certificate authority, "http://…".
	URL string
	// HTTP calls the control plane (nil: a default client).
	HTTP *http.Client
	Log  *slog.Logger
}

// Status is an agent's description of its host, as the REST API encodes it.
type Status struct {
	Version       string `json:"version"`
	VMM           string `json:"vmm"`
	Accelerator   string `json:"accelerator"`
	CPUs          int32  `json:"cpus"`
	MemoryBytes   int64  `json:"memory_bytes"`
	DiskBytes     int64  `json:"disk_bytes"`
	CapacityMiB   int64  `json:"capacity_mib"`
	Slots         int32  `json:"slots"`
	NetworkBlock  int32  `json:"network_block"`
	Sandboxes     int32  `json:"sandboxes"`
	UsedMemoryMiB int64  `json:"used_memory_mib"`
	UsedVCPUs     int32  `json:"used_vcpus"`
	DiskFreeBytes int64  `json:"disk_free_bytes"`
}

// StatusOf converts an agent's description of its host.
func StatusOf(m *hostagentv1.HostResponse) Status {
	return Status{
		Version: m.Version, VMM: m.Vmm, Accelerator: m.Accelerator, CPUs: m.Cpus, MemoryBytes: m.MemoryBytes, DiskBytes: m.DiskBytes,
		CapacityMiB: m.MemoryLimitMib, Slots: m.Slots, NetworkBlock: m.NetworkBlock,
		Sandboxes: m.Sandboxes, UsedMemoryMiB: m.MemoryUsedMib, UsedVCPUs: m.VcpusUsed, DiskFreeBytes: m.DiskFreeBytes,
	}
}

// credentials are stored on disk, where only root can read them.
type credentials struct {
	Version int    `json:"version"`
	Server  string `json:"server"`
	URL     string `json:"url"`
	// Host is the id; empty until the agent has registered.
	Host       string `json:"host_id,omitempty"`
	AgentToken string `json:"agent_token,omitempty"`
	Refresh    string `json:"refresh_token"`
	// Next is the next refresh token, if a refresh to it may have begun.
	Next string `json:"next_refresh_token,omitempty"`
	// PEM.
	Certificate string `json:"certificate,omitempty"`
	Authority   string `json:"authority,omitempty"`
	Key         string `json:"key,omitempty"`
}

// Host is this machine's registration with a control plane.
type Host struct {
	cfg    Config
	tls    bool
	listen pki.Listener

	// refreshing is held during a refresh. It is locked before mu, which refresh does not
	// hold during its call.
	refreshing sync.Mutex
	renewal    sync.WaitGroup // the refresh that renew started

	mu        sync.Mutex
	have      credentials
	token     string
	expires   time.Time
	heartbeat time.Duration
	renewing  bool // renew's refresh is running
}

// Error is an error response of the control plane.
type Error struct {
	Status  int
	Code    string
	Message string
}

func (e *Error) Error() string {
	return fmt.Sprintf("the control plane refused with %s: %s", e.Code, e.Message)
}

// Open registers this machine as a host, or loads its credentials if it is one. It
// returns when the agent has valid credentials to serve with, which needs no call if the
// stored ones are valid.
func Open(ctx context.Context, c Config, s Status) (*Host, error) {
	h, err := open(ctx, c, s)
	if err != nil {
		return nil, fmt.Errorf("register this host: %w", err)
	}
	return h, nil
}

func open(ctx context.Context, c Config, s Status) (*Host, error) {
	c.Server, c.URL = strings.TrimSuffix(c.Server, "/"), strings.TrimSuffix(c.URL, "/")
	u, err := url.Parse(c.Server)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("%q is not a control plane's URL like https://wrenn.example", c.Server)
	}
	if u.Scheme == "http" && !netaddr.Local(u.Host) {
		return nil, fmt.Errorf("%s: would send tokens unencrypted; use https", c.Server)
	}
	if err := checkURL(c.URL); err != nil {
		return nil, err
	}
	if c.HTTP == nil {
		// No redirects: they would send tokens to another server.
		c.HTTP = &http.Client{Timeout: callTimeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	h := &Host{cfg: c, tls: strings.HasPrefix(c.URL, "https://")}
	if err := h.load(); err != nil {
		return nil, err
	}
	if h.have.Host == "" || h.have.Server != c.Server || h.have.URL != c.URL {
		return h, h.register(ctx, s)
	}
	if h.tls {
		if err := h.listen.Set([]byte(h.have.Certificate), []byte(h.have.Key), []byte(h.have.Authority)); err != nil {
			return nil, err
		}
	}
	if !h.tls || time.Until(h.listen.NotAfter()) > time.Hour {
		return h, nil // Run refreshes the token
	}
	err = h.refresh(ctx)
	var refused *Error
	if errors.As(err, &refused) && refused.Status == http.StatusUnauthorized && c.Token != "" {
		return h, h.register(ctx, s)
	}
	return h, err
}

// checkURL checks an agent's URL.
func checkURL(text string) error {
	if strings.HasPrefix(text, "unix:") {
		return nil
	}
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.Port() == "" || u.Scheme != "http" && u.Scheme != "https" {
		return fmt.Errorf("%q is not an agent's URL like https://192.0.2.1:7070", text)
	}
	if ip := net.ParseIP(u.Hostname()); ip != nil && ip.IsUnspecified() {
		return fmt.Errorf("the control plane cannot call %s; set an address at which it reaches this host", ip)
	}
	if u.Scheme == "http" && !netaddr.Local(text) {
		return fmt.Errorf("%s: an agent that other machines reach must use https, with certificates", text)
	}
	return nil
}

// ID returns the host's id in text form.
func (h *Host) ID() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.have.Host
}

// AgentToken returns the token that the control plane sends the agent.
func (h *Host) AgentToken() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.have.AgentToken
}

// TLS returns the configuration with which the agent must serve, or nil for plain HTTP
// on this machine.
func (h *Host) TLS() *tls.Config {
	if !h.tls {
		return nil
	}
	return h.listen.TLS()
}

// Run renews the credentials in time and sends heartbeats with the result of status,
// until ctx is done. Then it tells the control plane that the agent is leaving.
func (h *Host) Run(ctx context.Context, status func() (Status, error)) error {
	pauses, down := backoff.New(200*time.Millisecond, maxPause), false
	for {
		wait, err := h.beat(ctx, status)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			if !down {
				h.cfg.Log.Warn("cannot send heartbeats to the control plane", "error", err)
			}
			down = true
			wait = pauses.Next()
			// No longer than a heartbeat, so that the control plane misses few.
			h.mu.Lock()
			wait = min(wait, max(h.heartbeat, time.Second))
			h.mu.Unlock()
		} else if down {
			h.cfg.Log.Info("sending heartbeats to the control plane again")
			pauses.Reset()
			down = false
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
			continue
		case <-ctx.Done():
			t.Stop()
		}
		break
	}
	h.renewal.Wait()
	bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), leavingTimeout)
	defer cancel()
	h.mu.Lock()
	token := h.token
	h.mu.Unlock()
	if token == "" {
		return nil
	}
	if err := h.call(bye, "/v1/hosts/heartbeat", token, heartbeat{Leaving: true}, nil); err != nil {
		h.cfg.Log.Warn("cannot tell the control plane that this host is leaving", "error", err)
	}
	return nil
}

// heartbeat is the body of a heartbeat.
type heartbeat struct {
	Status  *Status `json:"status,omitempty"`
	Leaving bool    `json:"leaving,omitempty"`
}

// beat sends a heartbeat, and renews credentials that have half of their life left. It
// returns the time until the next heartbeat. While the token is valid, the renewal runs
// in the background, so that one that fails or hangs delays no heartbeat.
func (h *Host) beat(ctx context.Context, status func() (Status, error)) (time.Duration, error) {
	h.mu.Lock()
	good := time.Until(h.expires) > 0
	old := time.Until(h.expires) < refreshBefore || h.tls && time.Until(h.listen.NotAfter()) < pki.HostLasts/2
	h.mu.Unlock()
	switch {
	case !good:
		if err := h.refresh(ctx); err != nil {
			return 0, err
		}
	case old:
		h.renew(ctx)
	}
	s, err := status()
	if err != nil {
		return 0, err
	}
	h.mu.Lock()
	token := h.token
	h.mu.Unlock()
	var answer struct {
		HeartbeatMS int64 `json:"heartbeat_ms"`
	}
	err = h.call(ctx, "/v1/hosts/heartbeat", token, heartbeat{Status: &s}, &answer)
	var refused *Error
	if errors.As(err, &refused) && refused.Status == http.StatusUnauthorized {
		h.mu.Lock()
		h.expires = time.Time{} // makes the next beat refresh first
		h.mu.Unlock()
	}
	if err != nil {
		return 0, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if answer.HeartbeatMS > 0 {
		h.heartbeat = time.Duration(answer.HeartbeatMS) * time.Millisecond
	}
	return h.heartbeat, nil
}

// refreshBefore is the time before the token's expiry at which the agent renews it: half
// of its hour.
const refreshBefore = 30 * time.Minute

// answer is the control plane's response to a registration or a refresh.
type answer struct {
	HostID      string    `json:"host_id"`
	Token       string    `json:"token"`
	ExpiresAt   time.Time `json:"expires_at"`
	AgentToken  string    `json:"agent_token"`
	Certificate string    `json:"certificate"`
	Authority   string    `json:"authority"`
	HeartbeatMS int64     `json:"heartbeat_ms"`
}

// register registers this host with the registration token.
func (h *Host) register(ctx context.Context, s Status) error {
	if h.cfg.Token == "" {
		return errors.New("a registration token is required (`wrenn host add` makes one)")
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	// Keep the refresh token of an earlier attempt, by which the control plane recognizes
	// the repeated registration.
	if h.have.Host != "" || h.have.Server != h.cfg.Server || h.have.URL != h.cfg.URL || h.have.Refresh == "" {
		h.have = credentials{Server: h.cfg.Server, URL: h.cfg.URL, Refresh: random()}
	}
	key, csr, err := h.request()
	if err != nil {
		return err
	}
	h.have.Key = key
	if err := h.save(h.have); err != nil {
		return err
	}
	var a answer
	err = h.call(ctx, "/v1/hosts/register", "", map[string]any{
		"token": h.cfg.Token, "url": h.cfg.URL, "refresh_hash": hash(h.have.Refresh), "csr": csr, "status": s,
	}, &a)
	if err != nil {
		return err
	}
	next := h.have
	next.Host, next.Next = a.HostID, ""
	return h.take(next, a, key)
}

// refresh exchanges the credentials for new ones.
func (h *Host) refresh(ctx context.Context) error {
	h.refreshing.Lock()
	defer h.refreshing.Unlock()
	h.mu.Lock()
	next := h.have
	h.mu.Unlock()
	if next.Next == "" {
		next.Next = random()
		if err := h.save(next); err != nil {
			return err
		}
		h.mu.Lock()
		h.have = next
		h.mu.Unlock()
	}
	key, csr, err := h.request()
	if err != nil {
		return err
	}
	var a answer
	err = h.call(ctx, "/v1/hosts/refresh", "", map[string]any{
		"refresh_token": next.Refresh, "next_hash": hash(next.Next), "csr": csr,
	}, &a)
	if err != nil {
		return err
	}
	next.Refresh, next.Next = next.Next, ""
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.take(next, a, key)
}

// renew starts a refresh in the background, unless one is running.
func (h *Host) renew(ctx context.Context) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.renewing {
		return
	}
	h.renewing = true
	h.renewal.Go(func() {
		err := h.refresh(ctx)
		if err != nil && ctx.Err() == nil {
			h.cfg.Log.Warn("cannot renew credentials", "error", err)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		h.renewing = false
	})
}

// take stores new credentials and uses them. The caller holds mu.
func (h *Host) take(next credentials, a answer, key string) error {
	next.AgentToken, next.Certificate, next.Authority, next.Key = a.AgentToken, a.Certificate, a.Authority, key
	if h.tls {
		if err := h.listen.Set([]byte(a.Certificate), []byte(key), []byte(a.Authority)); err != nil {
			return err
		}
	}
	if err := h.save(next); err != nil {
		return err
	}
	h.have, h.token, h.expires = next, a.Token, a.ExpiresAt
	h.heartbeat = time.Duration(a.HeartbeatMS) * time.Millisecond
	return nil
}

// request makes a key and a certificate signing request for it, both PEM. Both are empty
// for an agent without TLS.
func (h *Host) request() (key, csr string, err error) {
	if !h.tls {
		return "", "", nil
	}
	u, err := url.Parse(h.cfg.URL)
	if err != nil {
		return "", "", err
	}
	made, err := pki.NewKey()
	if err != nil {
		return "", "", err
	}
	text, err := pki.EncodeKey(made)
	if err != nil {
		return "", "", err
	}
	request, err := pki.NewRequest(made, u.Hostname())
	return string(text), string(request), err
}

// call posts a message to the control plane and decodes the response into v, unless v is
// nil. It returns an [Error] for an error response.
func (h *Host) call(ctx context.Context, path, token string, message, v any) error {
	body, err := json.Marshal(message)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.cfg.Server+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := h.cfg.HTTP.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		var e struct {
			Error struct{ Code, Message string }
		}
		if json.Unmarshal(content, &e) != nil || e.Error.Code == "" {
			return fmt.Errorf("the control plane responded with %s", resp.Status)
		}
		return &Error{Status: resp.StatusCode, Code: e.Error.Code, Message: e.Error.Message}
	}
	if v == nil {
		return nil
	}
	if err := json.Unmarshal(content, v); err != nil {
		return fmt.Errorf("read the control plane's response: %w", err)
	}
	return nil
}

// load reads the stored credentials, if any. It sets unreadable ones aside if the host
// can register again.
func (h *Host) load() error {
	path := h.cfg.Dir.Enrollment()
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read credentials: %w", err)
	}
	err = format.Credentials.CheckJSON(path, b)
	if err == nil {
		var have credentials
		if err = json.Unmarshal(b, &have); err == nil {
			h.have = have
			return nil
		}
	}
	err = fmt.Errorf("read credentials: %w", err)
	var newer *format.NewerError
	if errors.As(err, &newer) {
		return err
	}
	if h.cfg.Token == "" {
		return fmt.Errorf("%w; register this host again with a token from `wrenn host token`", err)
	}
	item, e := unreadable.Move(h.cfg.Dir, unreadable.Credentials, path, err)
	if e != nil {
		return errors.Join(err, e)
	}
	h.cfg.Log.Error("cannot read this host's credentials; set them aside and registering again", "path", item.Path, "error", err)
	return nil
}

// save stores the credentials durably and atomically.
func (h *Host) save(c credentials) error {
	c.Version = format.Credentials.Version
	path := h.cfg.Dir.Enrollment()
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = atomicfile.WriteJSON(path, c)
	}
	if err != nil {
		return fmt.Errorf("write credentials: %w", err)
	}
	return nil
}

// random makes a refresh token.
func random() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

func hash(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}
