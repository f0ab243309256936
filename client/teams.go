package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

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
