package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// Session is somebody who is logged in. Its tokens are secrets.
type Session struct {
	AccessToken     string    `json:"access_token"`
	RefreshToken    string    `json:"refresh_token"`
	AccessExpiresAt time.Time `json:"access_expires_at"`
	User            struct {
		ID    string `json:"id"`
		Email string `json:"email"`
	} `json:"user"`
}

// WithSession makes a client act for somebody who is logged in, whose access
// token it is, and not by an API key. People, teams and keys are dealt with in
// no other way.
func WithSession(accessToken string) Option { return func(c *Client) { c.access = accessToken } }

// WithTeam says for which of their teams somebody who is logged in acts; else
// it is the first that they joined.
func WithTeam(id string) Option { return func(c *Client) { c.team = id } }

// LogIn begins a session, which LogOut ends. It fails with "unauthenticated"
// for a wrong address or password.
func (c *Client) LogIn(ctx context.Context, email, password string) (*Session, error) {
	var s Session
	body := map[string]any{"email": email, "password": password, "tokens": true}
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/auth/login", json: body}, &s); err != nil {
		return nil, fmt.Errorf("log in: %w", err)
	}
	return &s, nil
}

// VerifyEmail opens the account that a mailed link, whose token it is, was made
// for, and logs it in.
func (c *Client) VerifyEmail(ctx context.Context, token, password string) (*Session, error) {
	var s Session
	body := map[string]any{"token": token, "password": password, "tokens": true}
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/auth/verify", json: body}, &s); err != nil {
		return nil, fmt.Errorf("verify address: %w", err)
	}
	return &s, nil
}

// Refresh changes a session's refresh token for new tokens. A refresh token is
// good for one use: keep the new one before anything else.
func (c *Client) Refresh(ctx context.Context, refreshToken string) (*Session, error) {
	var s Session
	err := c.call(ctx, request{method: http.MethodPost, path: "/v1/auth/refresh", json: map[string]any{"refresh_token": refreshToken}}, &s)
	if err != nil {
		return nil, fmt.Errorf("refresh session: %w", err)
	}
	return &s, nil
}

// LogOut ends the session of a refresh token, if it is one.
func (c *Client) LogOut(ctx context.Context, refreshToken string) error {
	r := request{method: http.MethodPost, path: "/v1/auth/logout", json: map[string]any{"refresh_token": refreshToken}, repeatable: true}
	if err := c.call(ctx, r, nil); err != nil {
		return fmt.Errorf("log out: %w", err)
	}
	return nil
}

// Team is who works together.
type Team struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Role      string    `json:"role,omitempty"` // the caller's: member, admin or owner
	CreatedAt time.Time `json:"created_at"`
}

// Member is somebody in a team.
type Member struct {
	ID       string    `json:"id"`
	Email    string    `json:"email"`
	Role     string    `json:"role"`
	JoinedAt time.Time `json:"joined_at"`
}

func teamPath(id, rest string) string { return "/v1/teams/" + url.PathEscape(id) + rest }

// Teams lists the teams that the caller is in, the one that they joined first
// first.
func (c *Client) Teams(ctx context.Context) ([]Team, error) {
	var r struct {
		Teams []Team `json:"teams"`
	}
	if err := c.call(ctx, request{method: http.MethodGet, path: "/v1/teams", repeatable: true}, &r); err != nil {
		return nil, fmt.Errorf("list teams: %w", err)
	}
	return r.Teams, nil
}

// CreateTeam makes a team, whose owner the caller is.
func (c *Client) CreateTeam(ctx context.Context, name string) (*Team, error) {
	var t Team
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/teams", json: map[string]any{"name": name}}, &t); err != nil {
		return nil, fmt.Errorf("make team: %w", err)
	}
	return &t, nil
}

// RenameTeam gives a team another name.
func (c *Client) RenameTeam(ctx context.Context, id, name string) (*Team, error) {
	var t Team
	r := request{method: http.MethodPatch, path: teamPath(id, ""), json: map[string]any{"name": name}, repeatable: true}
	if err := c.call(ctx, r, &t); err != nil {
		return nil, fmt.Errorf("rename team: %w", err)
	}
	return &t, nil
}

// DeleteTeam removes a team with all that it owns. Where a host cannot be
// reached the rest goes when it can.
func (c *Client) DeleteTeam(ctx context.Context, id string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: teamPath(id, "")}, nil); err != nil {
		return fmt.Errorf("delete team: %w", err)
	}
	return nil
}

// LeaveTeam takes the caller out of a team, and revokes the keys that they
// made for it.
func (c *Client) LeaveTeam(ctx context.Context, id string) error {
	if err := c.call(ctx, request{method: http.MethodPost, path: teamPath(id, "/leave")}, nil); err != nil {
		return fmt.Errorf("leave team: %w", err)
	}
	return nil
}

// Members lists who is in a team.
func (c *Client) Members(ctx context.Context, team string) ([]Member, error) {
	var r struct {
		Members []Member `json:"members"`
	}
	if err := c.call(ctx, request{method: http.MethodGet, path: teamPath(team, "/members"), repeatable: true}, &r); err != nil {
		return nil, fmt.Errorf("list members: %w", err)
	}
	return r.Members, nil
}

// AddMember takes somebody who has an account into a team, as member, admin or
// owner.
func (c *Client) AddMember(ctx context.Context, team, email, role string) (*Member, error) {
	var m Member
	r := request{method: http.MethodPost, path: teamPath(team, "/members"), json: map[string]any{"email": email, "role": role}}
	if err := c.call(ctx, r, &m); err != nil {
		return nil, fmt.Errorf("add member: %w", err)
	}
	return &m, nil
}

// ChangeMember gives a member another role.
func (c *Client) ChangeMember(ctx context.Context, team, user, role string) (*Member, error) {
	var m Member
	r := request{method: http.MethodPatch, path: teamPath(team, "/members/"+url.PathEscape(user)), json: map[string]any{"role": role}, repeatable: true}
	if err := c.call(ctx, r, &m); err != nil {
		return nil, fmt.Errorf("change member: %w", err)
	}
	return &m, nil
}

// RemoveMember takes somebody out of a team, and revokes the keys that they
// made for it.
func (c *Client) RemoveMember(ctx context.Context, team, user string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: teamPath(team, "/members/"+url.PathEscape(user))}, nil); err != nil {
		return fmt.Errorf("remove member: %w", err)
	}
	return nil
}

// Key is an API key of a team, without the key itself.
type Key struct {
	ID         string     `json:"id"`
	Name       string     `json:"name"`
	Prefix     string     `json:"prefix"` // its first characters
	Scopes     []string   `json:"scopes"` // of sandboxes, templates, read-only, platform; none: whatever a key may
	CreatedBy  string     `json:"created_by,omitempty"`
	CreatedAt  time.Time  `json:"created_at"`
	ExpiresAt  *time.Time `json:"expires_at,omitempty"`
	LastUsedAt *time.Time `json:"last_used_at,omitempty"`
	// Key is the key itself, which CreateKey alone returns.
	Key string `json:"key,omitempty"`
}

// KeyOptions is what an API key is asked to be.
type KeyOptions struct {
	Name      string     `json:"name"`
	Scopes    []string   `json:"scopes,omitempty"`
	ExpiresAt *time.Time `json:"expires_at,omitempty"` // nil: never
}

// CreateKey makes an API key of the team that the caller acts for.
func (c *Client) CreateKey(ctx context.Context, o KeyOptions) (*Key, error) {
	var k Key
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/keys", json: o}, &k); err != nil {
		return nil, fmt.Errorf("make API key: %w", err)
	}
	return &k, nil
}

// Keys lists the API keys of the team that the caller acts for, the newest first.
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
