package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// UsageAmount is what was used.
type UsageAmount struct {
	VCPUSeconds      float64 `json:"vcpu_seconds"`
	MemoryGiBSeconds float64 `json:"memory_gib_seconds"`
	SandboxStarts    int64   `json:"sandbox_starts"`
}

// UsageDay is what was used on a day, "2006-01-02" in UTC.
type UsageDay struct {
	Day    string      `json:"day"`
	Amount UsageAmount `json:"amount"`
}

// Usage is what a team used from one day to another, on each day on which it
// used anything.
type Usage struct {
	From  string      `json:"from"`
	To    string      `json:"to"`
	Days  []UsageDay  `json:"days"`
	Total UsageAmount `json:"total"`
	// StoredMiB is what the team has stored now.
	StoredMiB int64 `json:"stored_mib"`
}

// Usage returns what the team used. Zero times: from the first of the month,
// until today.
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

// MetricsPoint is what a sandbox used of its host at a time.
type MetricsPoint struct {
	Time        time.Time `json:"time"`
	CPUUsedPct  *float64  `json:"cpu_used_pct,omitempty"` // of all virtual CPUs together, since the point before; nil: not known
	MemoryBytes int64     `json:"memory_bytes"`
	DiskBytes   int64     `json:"disk_bytes"`
}

// MetricsHistory returns what a sandbox used lately, the oldest first: window
// is "10m", "2h" or "24h".
func (c *Client) MetricsHistory(ctx context.Context, id, window string) ([]MetricsPoint, error) {
	var h struct {
		Points []MetricsPoint `json:"points"`
	}
	if err := c.call(ctx, request{method: http.MethodGet, path: sandboxPath(id, "/metrics/history"), query: url.Values{"window": {window}}, repeatable: true}, &h); err != nil {
		return nil, fmt.Errorf("read metrics: %w", err)
	}
	return h.Points, nil
}
