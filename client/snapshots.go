package client

import (
	"context"
	"fmt"
	"iter"
	"net/http"
	"net/url"
)

// Snapshot captures a running or paused sandbox as a template. The sandbox keeps its
// state. The name must not be that of another template of the team.
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

// Snapshots lists the templates that were captured from the team's sandboxes,
// by name. An error ends the list.
func (c *Client) Snapshots(ctx context.Context) iter.Seq2[Template, error] {
	type page struct {
		Snapshots []Template `json:"snapshots"`
		Next      string     `json:"next_cursor"`
	}
	return pages(ctx, c, "/v1/snapshots", url.Values{}, func(p page) ([]Template, string) { return p.Snapshots, p.Next })
}

// DeleteSnapshot removes a template of the team, by name or id. Sandboxes that started
// from it are not affected.
func (c *Client) DeleteSnapshot(ctx context.Context, name string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: "/v1/snapshots/" + url.PathEscape(name), repeatable: true}, nil); err != nil {
		return fmt.Errorf("delete snapshot: %w", err)
	}
	return nil
}
