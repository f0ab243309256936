package sandboxes

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/page"
)

// Filter selects sandboxes to list.
type Filter struct {
	// States to list; empty: all that have not ended.
	States []State
	// Metadata that a listed sandbox must contain.
	Metadata map[string]string
	// Cursor is what the previous page returned; empty for the first page.
	Cursor string
	// Limit is the maximum number of sandboxes in a page.
	Limit int
}

// List returns a page of a team's sandboxes, newest first, and the cursor of
// the next page ("" on the last).
func (s *Service) List(ctx context.Context, team uuid.UUID, f Filter) ([]db.Sandbox, string, error) {
	if err := checkMetadata(f.Metadata); err != nil {
		return nil, "", err
	}
	at, before, err := page.Newest(f.Cursor)
	if err != nil {
		return nil, "", err
	}
	metadata := []byte("{}")
	if len(f.Metadata) > 0 {
		if metadata, err = json.Marshal(f.Metadata); err != nil {
			return nil, "", err
		}
	}
	var rows []db.Sandbox
	if len(f.States) == 0 {
		rows, err = s.Store.ListLiveSandboxes(ctx, db.ListLiveSandboxesParams{TeamID: team, Metadata: metadata, BeforeAt: at, BeforeID: before, MaxRows: int32(f.Limit) + 1})
	} else {
		states := make([]string, len(f.States))
		for i, st := range f.States {
			states[i] = string(st)
		}
		rows, err = s.Store.ListSandboxes(ctx, db.ListSandboxesParams{TeamID: team, States: states, Metadata: metadata, BeforeAt: at, BeforeID: before, MaxRows: int32(f.Limit) + 1})
	}
	if err != nil {
		return nil, "", fmt.Errorf("list sandboxes: %w", err)
	}
	rows, next := page.Cut(rows, f.Limit, func(row db.Sandbox) string { return page.Time(row.CreatedAt, row.ID) })
	return rows, next, nil
}
