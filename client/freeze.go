package client

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"net/http"
	"net/url"

	"github.com/google/uuid"
)

// Pause writes a sandbox's whole state to its host's disk and returns when it
// is there. One that is paused already is no error.
func (c *Client) Pause(ctx context.Context, id string) (*Sandbox, error) {
	return c.turn(ctx, id, "pause")
}

// Resume lets a paused sandbox go on where it was and returns when it runs. One
// that runs already is no error.
func (c *Client) Resume(ctx context.Context, id string) (*Sandbox, error) {
	return c.turn(ctx, id, "resume")
}

// Reboot starts a running or paused sandbox from its disk, without its memory, and
// returns when it runs. The guest need not answer.
func (c *Client) Reboot(ctx context.Context, id string) (*Sandbox, error) {
	return c.turn(ctx, id, "reboot")
}

func (c *Client) turn(ctx context.Context, id, what string) (*Sandbox, error) {
	var s Sandbox
	if err := c.call(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/"+what), repeatable: true}, &s); err != nil {
		return nil, fmt.Errorf("%s sandbox: %w", what, err)
	}
	return &s, nil
}

// Fork makes count copies of a running sandbox, which goes on, and returns when
// they run: all or none. They go on from the same moment, each with an id,
// tokens, host name and random numbers of its own.
func (c *Client) Fork(ctx context.Context, id string, count int) ([]Sandbox, error) {
	body := struct {
		Count int `json:"count"`
	}{count}
	var made struct {
		Sandboxes []Sandbox `json:"sandboxes"`
	}
	if err := c.call(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/fork"), json: body, repeatable: true, header: once("")}, &made); err != nil {
		return nil, fmt.Errorf("fork sandbox: %w", err)
	}
	return made.Sandboxes, nil
}

// Snapshot captures a running or paused sandbox, which stays as it is, as a
// template with a name that no other of the team's has.
func (c *Client) Snapshot(ctx context.Context, id, name string) (*Template, error) {
	body := struct {
		SandboxID string `json:"sandbox_id"`
		Name      string `json:"name"`
	}{id, name}
	var t Template
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/snapshots", json: body, repeatable: true, header: once("")}, &t); err != nil {
		return nil, fmt.Errorf("capture sandbox: %w", err)
	}
	return &t, nil
}

// once names a call, so that the service takes what is repeated of it for the
// same. Without a key the name is random, and the client alone repeats it.
func once(key string) http.Header {
	return http.Header{"Idempotency-Key": {cmp.Or(key, uuid.NewString())}}
}

// Snapshots lists the templates that were captured from the team's sandboxes,
// by name. An error ends the list.
func (c *Client) Snapshots(ctx context.Context) iter.Seq2[Template, error] {
	type page struct {
		Snapshots []Template `json:"snapshots"`
		Next      string     `json:"next_cursor"`
	}
	return pages(ctx, c, "/v1/snapshots", url.Values{}, func(p page) ([]Template, string) { return p.Snapshots, p.Next })
}

// DeleteSnapshot removes a template of the team, by name or id. Sandboxes that
// started from it go on.
func (c *Client) DeleteSnapshot(ctx context.Context, name string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: "/v1/snapshots/" + url.PathEscape(name), repeatable: true}, nil); err != nil {
		return fmt.Errorf("delete snapshot: %w", err)
	}
	return nil
}
