package hosts

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/scheduler"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// Places returns the hosts that have a template and room for a request, best first. It
// fails with no_capacity if there are none.
func (r *Registry) Places(ctx context.Context, template uuid.UUID, req scheduler.Request) ([]*Host, error) {
	rows, err := r.Store.ListPlaces(ctx, template)
	if err != nil {
		return nil, fmt.Errorf("list hosts with room: %w", err)
	}
	all := make([]scheduler.Host, len(rows))
	for i, row := range rows {
		all[i] = scheduler.Host{
			ID: row.ID, Tags: row.Tags, MemoryMiB: row.CapacityMib, CPUs: int64(row.CPUs), Slots: int64(row.Slots),
			UsedMemoryMiB: row.MemoryMiB, UsedVCPUs: row.VCPUs, Sandboxes: row.Sandboxes,
			DiskMiB: row.DiskBytes >> 20, FreeDiskMiB: row.DiskFreeBytes >> 20, PromisedDiskMiB: row.PromisedMib,
		}
	}
	var places []*Host
	for _, h := range r.Policy.Rank(req, all) {
		if host, err := r.Get(&h.ID); err == nil {
			places = append(places, host)
		}
	}
	switch {
	case len(places) > 0:
		return places, nil
	case len(all) == 0:
		return nil, fault.New(fault.NoCapacity, "no host that has the template accepts sandboxes now")
	case len(req.Tags) > 0:
		return nil, fault.New(fault.NoCapacity, "no host with tags %v has %d MiB of memory, %d virtual CPUs and enough disk space free", req.Tags, req.MemoryMiB, req.VCPUs)
	}
	return nil, fault.New(fault.NoCapacity, "no host has %d MiB of memory, %d virtual CPUs and enough disk space free", req.MemoryMiB, req.VCPUs)
}

// Reserve checks in q's transaction that a host still has room for a request, and fails
// with no_capacity otherwise. Call it before you insert the sandbox. Until the
// transaction ends, no other server can reserve there.
func (r *Registry) Reserve(ctx context.Context, q *db.Queries, host uuid.UUID, req scheduler.Request) error {
	row, err := q.LockPlace(ctx, host)
	if errors.Is(err, store.ErrNoRows) {
		return fault.New(fault.NoCapacity, "the host no longer accepts sandboxes")
	}
	if err != nil {
		return fmt.Errorf("reserve room on host: %w", err)
	}
	used, err := q.UsedPlace(ctx, &host)
	if err != nil {
		return fmt.Errorf("sum up the host's use: %w", err)
	}
	if !r.Policy.Fits(req, scheduler.Host{
		ID: row.ID, Tags: row.Tags, MemoryMiB: row.CapacityMib, CPUs: int64(row.CPUs), Slots: int64(row.Slots),
		UsedMemoryMiB: used.MemoryMiB, UsedVCPUs: used.VCPUs, Sandboxes: used.Sandboxes,
		DiskMiB: row.DiskBytes >> 20, FreeDiskMiB: row.DiskFreeBytes >> 20, PromisedDiskMiB: used.PromisedMib,
	}) {
		return fault.New(fault.NoCapacity, "the host was filled by concurrent requests")
	}
	return nil
}
