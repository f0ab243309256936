package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// UsageAmount is an amount of resources that sandboxes used.
type UsageAmount struct {
	VCPUSeconds      float64 `json:"vcpu_seconds"`
	MemoryGiBSeconds float64 `json:"memory_gib_seconds"`
	SandboxStarts    int64   `json:"sandbox_starts"`
}

// UsageDay is what a team used on a day, "2006-01-02" in UTC.
type UsageDay struct {
	Day    string      `json:"day"`
	Amount UsageAmount `json:"amount"`
}

// Usage is what a team used in a period, by day. Days without use are left out.
type Usage struct {
	From  string      `json:"from"`
	To    string      `json:"to"`
	Days  []UsageDay  `json:"days"`
	Total UsageAmount `json:"total"`
	// StoredMiB is how much the team stores now.
	StoredMiB int64 `json:"stored_mib"`
}

// Usage returns what the team used between two days (zero: the first of this month, and
// today).
func (c *Client) Usage(ctx context.Context, from, to time.Time) (*Usage, error) {
	q := url.Values{}
	if !from.IsZero() {
		q.Set("from", from.Format(time.DateOnly))
	}
	if !to.IsZero() {
		q.Set("to", to.Format(time.DateOnly))
	}
	var u Usage
	if err := c.call(ctx, request{method: http.MethodGet, path: "/v1/usage", query: q, repeatable: true}, &u); err != nil {
		return nil, fmt.Errorf("read usage: %w", err)
	}
	return &u, nil
}

// MetricsPoint is what a sandbox used of its host at one time.
type MetricsPoint struct {
	Time        time.Time `json:"time"`
	CPUUsedPct  *float64  `json:"cpu_used_pct,omitempty"` // of all vCPUs together, since the previous point; nil: not known
	MemoryBytes int64     `json:"memory_bytes"`
	DiskBytes   int64     `json:"disk_bytes"`
}

// MetricsHistory returns a sandbox's metrics of the last window ("10m", "2h" or "24h"),
// oldest first.
func (c *Client) MetricsHistory(ctx context.Context, id, window string) ([]MetricsPoint, error) {
	var h struct {
		Points []MetricsPoint `json:"points"`
	}
	if err := c.call(ctx, request{method: http.MethodGet, path: sandboxPath(id, "/metrics/history"), query: url.Values{"window": {window}}, repeatable: true}, &h); err != nil {
		return nil, fmt.Errorf("read metrics: %w", err)
	}
	return h.Points, nil
}
