package client

import (
	"context"
	"fmt"
	"net/http"
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
