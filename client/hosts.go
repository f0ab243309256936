package client

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"
)

// Host is a machine that sandboxes run on.
type Host struct {
	ID     string   `json:"id"`
	Name   string   `json:"name"`
	Tags   []string `json:"tags"`
	Status string   `json:"status"` // pending, online, unreachable, draining or offline
	URL    string   `json:"url"`

	Draining    bool   `json:"draining"`
	Version     string `json:"version"`
	VMM         string `json:"vmm"`
	Accelerator string `json:"accelerator"`
	CPUs        int    `json:"cpus"`
	CapacityMiB int64  `json:"capacity_mib"` // memory that sandboxes may have together
	Load        struct {
		Sandboxes     int   `json:"sandboxes"`
		UsedMemoryMiB int64 `json:"used_memory_mib"`
		UsedVCPUs     int   `json:"used_vcpus"`
		DiskFreeBytes int64 `json:"disk_free_bytes"`
	} `json:"load"`
	LastSeenAt *time.Time `json:"last_seen_at"`
	// Loses is what would be lost with the host: sandboxes by state, and teams'
	// templates that no other host has. Only PreviewHost says it.
	Loses *struct {
		Sandboxes map[string]int64 `json:"sandboxes"`
		Templates int64            `json:"templates"`
	} `json:"loses"`
}

// HostRegistration is a host that waits for its agent, and the token that the
// agent registers with, once and until it expires.
type HostRegistration struct {
	Host      Host      `json:"host"`
	Token     string    `json:"token"`
	ExpiresAt time.Time `json:"expires_at"`
}

// login is who a client logs in as for calls that take no key.
type login struct {
	email, password string

	mu      sync.Mutex
	token   string
	expires time.Time
}

// WithLogin has a client log in as a user for the calls that API keys do not
// do, which are those of the platform's admins.
func WithLogin(email, password string) Option {
	return func(c *Client) { c.login = &login{email: email, password: password} }
}

// admin is a call of the platform's admins.
func (c *Client) admin(ctx context.Context, r request, result any) error {
	header, err := c.loggedIn(ctx)
	if err != nil {
		return err
	}
	r.header = header
	return c.call(ctx, r, result)
}

// loggedIn is the header of a call by the user that the client logs in as, and
// nothing without one.
func (c *Client) loggedIn(ctx context.Context) (http.Header, error) {
	if c.login == nil {
		return nil, nil
	}
	l := c.login
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Until(l.expires) < time.Minute {
		var answer struct {
			AccessToken string    `json:"access_token"`
			ExpiresAt   time.Time `json:"access_expires_at"`
		}
		err := c.call(ctx, request{
			method: http.MethodPost, path: "/v1/auth/login", json: map[string]any{"email": l.email, "password": l.password, "tokens": true},
		}, &answer)
		if IsNotFound(err) {
			return nil, nil // A service where keys do all.
		}
		if err != nil {
			return nil, err
		}
		l.token, l.expires = answer.AccessToken, answer.ExpiresAt
	}
	return http.Header{"Authorization": {"Bearer " + l.token}}, nil
}

func hostPath(id, rest string) string { return "/v1/admin/hosts/" + url.PathEscape(id) + rest }

// AddHost makes a host that waits for its agent.
func (c *Client) AddHost(ctx context.Context, name string, tags []string) (*HostRegistration, error) {
	body := map[string]any{"name": name}
	if len(tags) > 0 {
		body["tags"] = tags
	}
	var r HostRegistration
	if err := c.admin(ctx, request{method: http.MethodPost, path: "/v1/admin/hosts", json: body}, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// RenewHostToken makes another registration token for a host.
func (c *Client) RenewHostToken(ctx context.Context, id string) (*HostRegistration, error) {
	var r HostRegistration
	if err := c.admin(ctx, request{method: http.MethodPost, path: hostPath(id, "/token")}, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// Hosts lists all hosts.
func (c *Client) Hosts(ctx context.Context) ([]Host, error) {
	var r struct {
		Hosts []Host `json:"hosts"`
	}
	err := c.admin(ctx, request{method: http.MethodGet, path: "/v1/admin/hosts", repeatable: true}, &r)
	return r.Hosts, err
}

// PreviewHost returns a host and what would be lost with it.
func (c *Client) PreviewHost(ctx context.Context, id string) (*Host, error) {
	var h Host
	err := c.admin(ctx, request{method: http.MethodGet, path: hostPath(id, ""), query: url.Values{"preview": {"true"}}, repeatable: true}, &h)
	if err != nil {
		return nil, err
	}
	return &h, nil
}

// DrainHost says whether a host gets no new sandboxes.
func (c *Client) DrainHost(ctx context.Context, id string, draining bool) (*Host, error) {
	var h Host
	err := c.admin(ctx, request{method: http.MethodPatch, path: hostPath(id, ""), json: map[string]any{"draining": draining}, repeatable: true}, &h)
	if err != nil {
		return nil, err
	}
	return &h, nil
}

// DeleteHost removes a host. Without force it fails with "conflict" when
// anything would be lost.
func (c *Client) DeleteHost(ctx context.Context, id string, force bool) error {
	return c.admin(ctx, request{method: http.MethodDelete, path: hostPath(id, ""), query: url.Values{"force": {strconv.FormatBool(force)}}, repeatable: true}, nil)
}
