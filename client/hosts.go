package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Host is a machine that sandboxes run on. All operations on hosts need an API key with
// the scope platform.
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
	MemoryBytes int64  `json:"memory_bytes"`
	DiskBytes   int64  `json:"disk_bytes"`
	CapacityMiB int64  `json:"capacity_mib"` // memory that sandboxes may have together
	Slots       int    `json:"slots"`        // how many sandboxes can run at once
	// NetworkBlock is the number of the block of network slots that the host's agent uses.
	NetworkBlock int `json:"network_block"`
	Load         struct {
		Sandboxes     int   `json:"sandboxes"`
		UsedMemoryMiB int64 `json:"used_memory_mib"`
		UsedVCPUs     int   `json:"used_vcpus"`
		DiskFreeBytes int64 `json:"disk_free_bytes"`
	} `json:"load"`
	// Problems are faults of the host that its agent could not repair.
	Problems   []HostProblem `json:"problems"`
	CreatedAt  time.Time     `json:"created_at"`
	LastSeenAt *time.Time    `json:"last_seen_at"`
	// Loses is what would be lost with the host: sandboxes by state, and teams'
	// templates that no other host has. Only PreviewHost sets it.
	Loses *struct {
		Sandboxes map[string]int64 `json:"sandboxes"`
		Templates int64            `json:"templates"`
	} `json:"loses"`
}

// HostProblem is a fault of a host.
type HostProblem struct {
	Kind    string    `json:"kind"`   // stable between releases
	Object  string    `json:"object"` // what is at fault, such as a sandbox; empty: the host
	Message string    `json:"message"`
	Since   time.Time `json:"since"`
}

// HostRegistration is a host that waits for its agent, with the token that the agent
// registers with. The token is good for one use, until it expires.
type HostRegistration struct {
	Host      Host      `json:"host"`
	Token     string    `json:"token"`
	ExpiresAt time.Time `json:"expires_at"`
}

func hostPath(id, rest string) string { return "/v1/admin/hosts/" + url.PathEscape(id) + rest }

// AddHost adds a host, which waits for its agent to register.
func (c *Client) AddHost(ctx context.Context, name string, tags []string) (*HostRegistration, error) {
	body := map[string]any{"name": name}
	if len(tags) > 0 {
		body["tags"] = tags
	}
	var r HostRegistration
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/admin/hosts", json: body}, &r); err != nil {
		return nil, fmt.Errorf("add host: %w", err)
	}
	return &r, nil
}

// RenewHostToken creates a new registration token for a host.
func (c *Client) RenewHostToken(ctx context.Context, id string) (*HostRegistration, error) {
	var r HostRegistration
	if err := c.call(ctx, request{method: http.MethodPost, path: hostPath(id, "/token")}, &r); err != nil {
		return nil, fmt.Errorf("renew host's token: %w", err)
	}
	return &r, nil
}

// Hosts lists all hosts.
func (c *Client) Hosts(ctx context.Context) ([]Host, error) {
	var r struct {
		Hosts []Host `json:"hosts"`
	}
	if err := c.call(ctx, request{method: http.MethodGet, path: "/v1/admin/hosts", repeatable: true}, &r); err != nil {
		return nil, fmt.Errorf("list hosts: %w", err)
	}
	return r.Hosts, nil
}

// PreviewHost returns a host and what would be lost with it.
func (c *Client) PreviewHost(ctx context.Context, id string) (*Host, error) {
	var h Host
	err := c.call(ctx, request{method: http.MethodGet, path: hostPath(id, ""), query: url.Values{"preview": {"true"}}, repeatable: true}, &h)
	if err != nil {
		return nil, fmt.Errorf("look at host: %w", err)
	}
	return &h, nil
}

// DrainHost starts or stops draining a host. A draining host gets no new sandboxes, and
// its idle ones are paused.
func (c *Client) DrainHost(ctx context.Context, id string, draining bool) (*Host, error) {
	return c.changeHost(ctx, id, map[string]any{"draining": draining})
}

// TagHost replaces a host's tags.
func (c *Client) TagHost(ctx context.Context, id string, tags []string) (*Host, error) {
	if tags == nil {
		tags = []string{}
	}
	return c.changeHost(ctx, id, map[string]any{"tags": tags})
}

func (c *Client) changeHost(ctx context.Context, id string, change map[string]any) (*Host, error) {
	var h Host
	if err := c.call(ctx, request{method: http.MethodPatch, path: hostPath(id, ""), json: change, repeatable: true}, &h); err != nil {
		return nil, fmt.Errorf("change host: %w", err)
	}
	return &h, nil
}

// DeleteHost removes a host. Without force it fails with "conflict" if sandboxes or
// templates would be lost.
func (c *Client) DeleteHost(ctx context.Context, id string, force bool) error {
	r := request{method: http.MethodDelete, path: hostPath(id, ""), query: url.Values{"force": {strconv.FormatBool(force)}}, repeatable: true}
	if err := c.call(ctx, r, nil); err != nil {
		return fmt.Errorf("delete host: %w", err)
	}
	return nil
}
