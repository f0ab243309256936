package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// Key is an API key of a team, without the key itself.
type Key struct {
	ID         string     `json:"id"`
	Name       string     `json:"name"`
	Prefix     string     `json:"prefix"` // its first characters
	Scopes     []string   `json:"scopes"` // sandboxes, templates, read-only, platform; none: all that a key may do
	CreatedBy  string     `json:"created_by,omitempty"`
	CreatedAt  time.Time  `json:"created_at"`
	ExpiresAt  *time.Time `json:"expires_at,omitempty"`
	LastUsedAt *time.Time `json:"last_used_at,omitempty"`
	// Key is the key itself. Only CreateKey returns it.
	Key string `json:"key,omitempty"`
}

// KeyOptions configure a new API key.
type KeyOptions struct {
	Name      string     `json:"name"`
	Scopes    []string   `json:"scopes,omitempty"`
	ExpiresAt *time.Time `json:"expires_at,omitempty"` // nil: never
}

// CreateKey creates an API key for the team that the caller acts for.
func (c *Client) CreateKey(ctx context.Context, o KeyOptions) (*Key, error) {
	var k Key
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/keys", json: o}, &k); err != nil {
		return nil, fmt.Errorf("create API key: %w", err)
	}
	return &k, nil
}

// Keys lists the API keys of the team that the caller acts for, newest first.
func (c *Client) Keys(ctx context.Context) ([]Key, error) {
	var all []Key
	query := url.Values{}
	for {
		var page struct {
			Keys       []Key  `json:"keys"`
			NextCursor string `json:"next_cursor"`
		}
		if err := c.call(ctx, request{method: http.MethodGet, path: "/v1/keys", query: query, repeatable: true}, &page); err != nil {
			return nil, fmt.Errorf("list API keys: %w", err)
		}
		all = append(all, page.Keys...)
		if page.NextCursor == "" {
			return all, nil
		}
		query.Set("cursor", page.NextCursor)
	}
}

// RevokeKey revokes an API key, at once and for good.
func (c *Client) RevokeKey(ctx context.Context, id string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: "/v1/keys/" + url.PathEscape(id)}, nil); err != nil {
		return fmt.Errorf("revoke API key: %w", err)
	}
	return nil
}
