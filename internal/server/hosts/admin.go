package hosts

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// deletionTimeout bounds the calls to a host that is being deleted.
const deletionTimeout = 20 * time.Second

// Status returns a host's status in the API.
func Status(row db.Host) string {
	if row.Draining && row.Status == "online" {
		return "draining"
	}
	return row.Status
}

// Load is what deleting a host would lose.
type Load struct {
	// Sandboxes counts the sandboxes that have not ended, by state.
	Sandboxes map[string]int64
	// Templates counts teams' templates that no other host has.
	Templates int64
}

func (l Load) empty() bool { return len(l.Sandboxes) == 0 && l.Templates == 0 }

// List returns every host.
func (r *Registry) List(ctx context.Context) ([]db.Host, error) {
	rows, err := r.Store.ListHosts(ctx)
	if err != nil {
		return nil, fmt.Errorf("list hosts: %w", err)
	}
	return rows, nil
}

// Describe returns a host and what deleting it would lose, or fails with not_found.
func (r *Registry) Describe(ctx context.Context, host uuid.UUID) (db.Host, Load, error) {
	return describe(ctx, r.Store.Queries, host)
}

func describe(ctx context.Context, q *db.Queries, host uuid.UUID) (db.Host, Load, error) {
	row, err := q.GetHost(ctx, host)
	if errors.Is(err, store.ErrNoRows) {
		return row, Load{}, fault.New(fault.NotFound, "no such host")
	}
	if err != nil {
		return row, Load{}, fmt.Errorf("look up host: %w", err)
	}
	counts, err := q.CountHostLoses(ctx, &host)
	if err != nil {
		return row, Load{}, fmt.Errorf("count the host's sandboxes: %w", err)
	}
	l := Load{Sandboxes: make(map[string]int64, len(counts))}
	for _, c := range counts {
		l.Sandboxes[c.State] = c.N
	}
	if l.Templates, err = q.CountHostOnlyTemplates(ctx, host); err != nil {
		return row, Load{}, fmt.Errorf("count the host's templates: %w", err)
	}
	return row, l, nil
}

// Change describes an update of a host. Nil fields stay unchanged.
type Change struct {
	Draining *bool
	Name     *string
	Tags     []string
}

// Update changes a host.
func (r *Registry) Update(ctx context.Context, host uuid.UUID, c Change) (db.Host, error) {
	row, err := r.Store.UpdateHost(ctx, db.UpdateHostParams{ID: host, Draining: c.Draining, Name: c.Name, Tags: c.Tags})
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.NotFound, "no such host")
	}
	if err != nil {
		return row, fmt.Errorf("update host: %w", err)
	}
	return row, nil
}

// Delete deletes a host and revokes its agent's credentials and certificates. Without
// force, it fails with conflict if that would lose anything. With force, it ends the
// host's sandboxes, destroys them on the host if it is reachable, and returns them.
func (r *Registry) Delete(ctx context.Context, host uuid.UUID, force bool) ([]uuid.UUID, error) {
	var lost []uuid.UUID
	err := r.Store.InTx(ctx, func(q *db.Queries) error {
		// The lock keeps other transactions from placing sandboxes here.
		if _, err := q.LockHost(ctx, host); err != nil && !errors.Is(err, store.ErrNoRows) {
			return err
		}
		row, load, err := describe(ctx, q, host)
		if err != nil {
			return err
		}
		if !row.Enrolled {
			return fault.New(fault.Conflict, "the server's own configuration names this host (WRENN_AGENT_URL)")
		}
		if !force && !load.empty() {
			return fault.New(fault.Conflict, "deleting the host would lose sandboxes or templates: see which (GET with preview), then delete it with force")
		}
		if lost, err = q.LoseHostSandboxes(ctx, &host); err != nil {
			return err
		}
		return errors.Join(q.DropTemplatesOfHost(ctx, host), q.DropHostCertificates(ctx, host), q.DeleteHost(ctx, host))
	})
	if err != nil {
		return nil, wrap("delete host", err)
	}
	r.announce(host) // Others only: this server still has to call the host.
	r.Log.Info("host deleted", "host_id", id.Format(id.Host, host), "sandboxes", len(lost))
	if h, err := r.Get(&host); err == nil {
		r.clear(ctx, h, lost)
	}
	_, err = r.Refresh(ctx)
	return lost, err
}

// clear destroys sandboxes on a deleted host, as far as it is reachable.
func (r *Registry) clear(ctx context.Context, h *Host, sandboxes []uuid.UUID) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deletionTimeout)
	defer cancel()
	var wg sync.WaitGroup
	turn := make(chan struct{}, 8)
	for _, sandbox := range sandboxes {
		wg.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			if ctx.Err() != nil {
				return
			}
			_, err := h.Agent.Destroy(ctx, connect.NewRequest(&hostagentv1.DestroyRequest{SandboxId: id.Format(id.Sandbox, sandbox)}))
			if err != nil {
				r.Log.Warn("destroy sandbox on a deleted host", "sandbox_id", id.Format(id.Sandbox, sandbox), "error", err)
			}
		})
	}
	wg.Wait()
}
