package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// Session is a user's log-in. Its tokens are secrets.
type Session struct {
	AccessToken     string    `json:"access_token"`
	RefreshToken    string    `json:"refresh_token"`
	AccessExpiresAt time.Time `json:"access_expires_at"`
	User            struct {
		ID    string `json:"id"`
		Email string `json:"email"`
	} `json:"user"`
}

// WithSession makes the client authenticate with a session's access token instead of an
// API key. Operations on users, teams and keys need a session.
func WithSession(accessToken string) Option { return func(c *Client) { c.access = accessToken } }

// WithTeam selects the team for which a session's user acts (the first that they
// joined).
func WithTeam(id string) Option { return func(c *Client) { c.team = id } }

// LogIn starts a session; LogOut ends it. A wrong address or password fails with
// "unauthenticated".
func (c *Client) LogIn(ctx context.Context, email, password string) (*Session, error) {
	var s Session
	body := map[string]any{"email": email, "password": password, "tokens": true}
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/auth/login", json: body}, &s); err != nil {
		return nil, fmt.Errorf("log in: %w", err)
	}
	return &s, nil
}

// VerifyEmail activates an account with the token of a mailed link and the password
// that was chosen, and logs in.
func (c *Client) VerifyEmail(ctx context.Context, token, password string) (*Session, error) {
	var s Session
	body := map[string]any{"token": token, "password": password, "tokens": true}
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/auth/verify", json: body}, &s); err != nil {
		return nil, fmt.Errorf("verify address: %w", err)
	}
	return &s, nil
}

// Refresh exchanges a refresh token for new tokens. A refresh token is good for one use,
// so store the new one first.
func (c *Client) Refresh(ctx context.Context, refreshToken string) (*Session, error) {
	var s Session
	err := c.call(ctx, request{method: http.MethodPost, path: "/v1/auth/refresh", json: map[string]any{"refresh_token": refreshToken}}, &s)
	if err != nil {
		return nil, fmt.Errorf("refresh session: %w", err)
	}
	return &s, nil
}

// LogOut ends the session of a refresh token. An unknown token is not an error.
func (c *Client) LogOut(ctx context.Context, refreshToken string) error {
	r := request{method: http.MethodPost, path: "/v1/auth/logout", json: map[string]any{"refresh_token": refreshToken}, repeatable: true}
	if err := c.call(ctx, r, nil); err != nil {
		return fmt.Errorf("log out: %w", err)
	}
	return nil
}

// Team is a group of users that owns sandboxes, templates and keys.
type Team struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Role      string    `json:"role,omitempty"` // the caller's: member, admin or owner
	CreatedAt time.Time `json:"created_at"`
}

// Member is a user in a team.
type Member struct {
	ID       string    `json:"id"`
	Email    string    `json:"email"`
	Role     string    `json:"role"`
	JoinedAt time.Time `json:"joined_at"`
}

func teamPath(id, rest string) string { return "/v1/teams/" + url.PathEscape(id) + rest }

// Teams lists the caller's teams in the order in which they joined.
func (c *Client) Teams(ctx context.Context) ([]Team, error) {
	var r struct {
		Teams []Team `json:"teams"`
	}
	if err := c.call(ctx, request{method: http.MethodGet, path: "/v1/teams", repeatable: true}, &r); err != nil {
		return nil, fmt.Errorf("list teams: %w", err)
	}
	return r.Teams, nil
}

// CreateTeam creates a team with the caller as its owner.
func (c *Client) CreateTeam(ctx context.Context, name string) (*Team, error) {
	var t Team
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/teams", json: map[string]any{"name": name}}, &t); err != nil {
		return nil, fmt.Errorf("create team: %w", err)
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

// DeleteTeam deletes a team with everything that it owns. Files on an unreachable host
// are deleted when the host returns.
func (c *Client) DeleteTeam(ctx context.Context, id string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: teamPath(id, "")}, nil); err != nil {
		return fmt.Errorf("delete team: %w", err)
	}
	return nil
}

// LeaveTeam removes the caller from a team and revokes the keys that they made for it.
func (c *Client) LeaveTeam(ctx context.Context, id string) error {
	if err := c.call(ctx, request{method: http.MethodPost, path: teamPath(id, "/leave")}, nil); err != nil {
		return fmt.Errorf("leave team: %w", err)
	}
	return nil
}

// Members lists the members of a team.
func (c *Client) Members(ctx context.Context, team string) ([]Member, error) {
	var r struct {
		Members []Member `json:"members"`
	}
	if err := c.call(ctx, request{method: http.MethodGet, path: teamPath(team, "/members"), repeatable: true}, &r); err != nil {
		return nil, fmt.Errorf("list members: %w", err)
	}
	return r.Members, nil
}

// AddMember adds a user who has an account to a team, as "member", "admin" or "owner".
func (c *Client) AddMember(ctx context.Context, team, email, role string) (*Member, error) {
	var m Member
	r := request{method: http.MethodPost, path: teamPath(team, "/members"), json: map[string]any{"email": email, "role": role}}
	if err := c.call(ctx, r, &m); err != nil {
		return nil, fmt.Errorf("add member: %w", err)
	}
	return &m, nil
}

// ChangeMember changes a member's role.
func (c *Client) ChangeMember(ctx context.Context, team, user, role string) (*Member, error) {
	var m Member
	r := request{method: http.MethodPatch, path: teamPath(team, "/members/"+url.PathEscape(user)), json: map[string]any{"role": role}, repeatable: true}
	if err := c.call(ctx, r, &m); err != nil {
		return nil, fmt.Errorf("change member: %w", err)
	}
	return &m, nil
}

// RemoveMember removes a member from a team and revokes the keys that they made for it.
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
