package server_test

import (
	"context"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// TestKeyOfRemovedMember checks that a server caches keys for commands only until it has
// answered a call that took the rights of a key's creator.
func TestKeyOfRemovedMember(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	admin := as(p.bearerOf("admin@example.com"))
	key := p.ownerOf(1, "ada@example.com")[0]
	var ada uuid.UUID
	if err := p.db().QueryRow(t.Context(), "SELECT id FROM users WHERE email = 'ada@example.com'").Scan(&ada); err != nil {
		t.Fatal(err)
	}
	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", key).want(201).str("id")
	exec := func() response {
		return p.call("POST", "/v1/sandboxes/"+sandbox+"/exec", map[string]any{"cmd": "cat"}, "X-API-Key", key)
	}
	for _, active := range []bool{true, false, true, false} {
		p.call("PATCH", "/v1/admin/users/"+id.Format(id.User, ada), map[string]any{"active": active}, admin...).want(200)
		if active {
			exec().want(200)
		} else {
			exec().fails(401, "unauthenticated")
		}
	}
}

// TestMissedNotification checks that a server which caches where a sandbox runs does not
// read the table for each command, but reads it if the host does not have the sandbox,
// because the notification may still be on its way.
func TestMissedNotification(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	ctx, cancel := context.WithTimeout(t.Context(), await.Hang)
	defer cancel()
	exec := func(sandbox string) response {
		return p.call("POST", "/v1/sandboxes/"+sandbox+"/exec", map[string]any{"cmd": "cat"})
	}
	ended, moved := p.create(map[string]any{}), p.create(map[string]any{})
	exec(ended).want(200)
	exec(moved).want(200)

	tx, err := p.db().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, "LOCK TABLE sandboxes IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	exec(moved).want(200)
	if err := tx.Rollback(ctx); err != nil {
		t.Fatal(err)
	}

	other := p.enroll("other")
	host, err := id.Parse(id.Host, other.id)
	if err != nil {
		t.Fatal(err)
	}
	inside := func(sandbox string) uuid.UUID {
		u, err := id.Parse(id.Sandbox, sandbox)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	other.add(moved, 0)
	// The server gets no notification of this.
	p.sql("UPDATE sandboxes SET host_id = $2 WHERE id = $1", inside(moved), host)
	p.sql("UPDATE sandboxes SET state = 'stopped' WHERE id = $1", inside(ended))
	p.agent.forget(moved)
	p.agent.forget(ended)
	exec(moved).want(200)
	exec(ended).fails(409, "conflict")
	// The cached place does not let in another team's key.
	p.call("POST", "/v1/sandboxes/"+moved+"/exec", map[string]any{"cmd": "cat"}, "X-API-Key", p.ownerOf(1, "bob@example.com")[0]).fails(404, "not_found")
}
