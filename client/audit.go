package client

import (
	"context"
	"iter"
	"net/url"
	"time"
)

// AuditRecord is an entry of the audit log: a change that somebody asked for, or that
// a host or the platform made by itself.
type AuditRecord struct {
	ID         string    `json:"id"`
	At         time.Time `json:"at"`
	TeamID     string    `json:"team_id,omitempty"`
	ActorKind  string    `json:"actor_kind"` // "user", "key", "host", "platform" or "anonymous"
	Actor      string    `json:"actor"`      // id, or the kind if it has none
	UserID     string    `json:"user_id,omitempty"`
	Action     string    `json:"action"` // operation of the API, or event
	ObjectKind string    `json:"object_kind"`
	Object     string    `json:"object"`
	Address    string    `json:"address"`
	RequestID  string    `json:"request_id"`
	Result     string    `json:"result"` // "ok", "refused" or "failed"
	Code       string    `json:"code"`
	Count      int64     `json:"count"` // of requests: like refusals share one record per minute
}

// AuditOptions selects audit records. Zero fields match everything.
type AuditOptions struct {
	Actor, Action, Object, Result string
	From, To                      time.Time
}

// Audit lists the team's audit records, newest first. An error ends the list.
func (c *Client) Audit(ctx context.Context, o AuditOptions) iter.Seq2[AuditRecord, error] {
	q := url.Values{}
	for name, v := range map[string]string{"actor": o.Actor, "action": o.Action, "object": o.Object, "result": o.Result} {
		if v != "" {
			q.Set(name, v)
		}
	}
	for name, at := range map[string]time.Time{"from": o.From, "to": o.To} {
		if !at.IsZero() {
			q.Set(name, at.UTC().Format(time.RFC3339Nano))
		}
	}
	type page struct {
		Records []AuditRecord `json:"records"`
		Next    string        `json:"next_cursor"`
	}
	return pages(ctx, c, "/v1/audit", q, func(p page) ([]AuditRecord, string) { return p.Records, p.Next })
}
