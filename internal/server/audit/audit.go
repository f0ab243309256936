// Package audit keeps the record of who changed what: of every change that the
// API is asked for, whatever became of it, and of what hosts and the platform
// change by themselves. Records are never changed, and go when they are old.
//
// A change that somebody asked for is recorded before it is answered: nothing
// is acknowledged that has no record. It is not one transaction with the change,
// which mostly is a host's work and takes as long as that; a server that dies
// between the two leaves a change that nobody was told of and no record of it.
// What happens by itself is recorded by the database, in the transaction that
// writes it down.
package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/page"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/text"
)

// Who acts.
const (
	User      = "user"
	Key       = "key"
	Host      = "host"
	Platform  = "platform"
	Anonymous = "anonymous"
)

// What became of it: it was done, it was not because of who asked or what
// was asked for, or it could not be.
const (
	OK      = "ok"
	Refused = "refused"
	Failed  = "failed"
)

const (
	pruneEvery = 10 * time.Minute
	// batch is how many records are removed, or read for an export, at a time.
	batch = 1000
	// maxText bounds what a record quotes.
	maxText = 200
)

// Record is one change, or one that was asked for.
type Record struct {
	ID uuid.UUID
	At time.Time
	// Team is whose record it is; nil: the platform's alone.
	Team *uuid.UUID
	// Actor is what kind of one it was, ActorID which; User, for a key, who made it.
	Actor   string
	ActorID *uuid.UUID
	User    *uuid.UUID
	// Action is the API's operation, or what happened.
	Action string
	// Object is the kind of what was changed, ObjectID its id on the wire, or its
	// name; empty where there is none.
	Object, ObjectID string
	// Address is where the request came from, RequestID what it was called.
	Address, RequestID string
	Result             string
	// Code is the error's where Result is not OK.
	Code string
	// Count is how many requests the record stands for: refused ones of one actor
	// and action, with one code, are one record a minute, that of the first.
	Count int64
}

// bucket names the record that a refused request is counted in; nil: its own.
func (r Record) bucket(now time.Time) *string {
	if r.Result != Refused {
		return nil
	}
	who := r.ActorName()
	if r.ActorID == nil {
		who += " " + r.Address
	}
	team := ""
	if r.Team != nil {
		team = r.Team.String()
	}
	name := fmt.Sprintf("%s %s %s %s %d", who, team, r.Action, r.Code, now.Unix()/60)
	return &name
}

// prefixes of ids, by the kinds of objects that have them.
var prefixes = map[string]id.Kind{
	"sandbox": id.Sandbox, "team": id.Team, "user": id.User, "host": id.Host, "template": id.Template, "build": id.Build, "key": id.APIKey, "channel": id.Channel,
}

// inside is an object's id as records have it: a UUID where it is one.
func inside(object, name string) string {
	if u, err := id.Parse(prefixes[object], name); prefixes[object] != "" && err == nil {
		return u.String()
	}
	return text.Clean(name, maxText)
}

// outside undoes inside.
func outside(object, name string) string {
	if u, err := uuid.Parse(name); prefixes[object] != "" && err == nil {
		return id.Format(prefixes[object], u)
	}
	return name
}

// ActorName is who acted, as people are shown it: an id, or what it is that
// has none.
func (r Record) ActorName() string {
	if r.ActorID == nil {
		return r.Actor
	}
	return id.Format(prefixes[r.Actor], *r.ActorID)
}

// Log is the record of everything.
type Log struct {
	store *store.Store
	keep  time.Duration
	log   *slog.Logger
}

// New returns the log of a store, whose records go after keep (0: never) if
// Run runs.
func New(s *store.Store, keep time.Duration, log *slog.Logger) *Log { return &Log{s, keep, log} }

// Write writes a record; the database says when it was.
func (l *Log) Write(ctx context.Context, r Record) error {
	u, err := uuid.NewV7()
	if err != nil {
		return err
	}
	err = l.store.InsertAudit(ctx, db.InsertAuditParams{
		ID: u, TeamID: r.Team, Actor: r.Actor, ActorID: r.ActorID, UserID: r.User, Action: r.Action, Object: r.Object, ObjectID: inside(r.Object, r.ObjectID),
		Address: r.Address, RequestID: r.RequestID, Result: r.Result, Code: r.Code, Bucket: r.bucket(time.Now()),
	})
	if err != nil {
		return fmt.Errorf("write audit record: %w", err)
	}
	return nil
}

// Filter says which records are listed; what is zero is not looked at.
type Filter struct {
	// Team: nil is every team and the platform.
	Team *uuid.UUID
	// Actor is an id of a user, key or host on the wire, or a kind of actor.
	Actor string
	// Action, Object (an id on the wire, or a name) and Result are as records have them.
	Action, Object, Result string
	From, To               time.Time
	// Cursor of the page, as the page before it gave; empty: the first.
	Cursor string
	Limit  int
}

// List returns a page of records, newest first, and the cursor of the next page
// ("" on the last).
func (l *Log) List(ctx context.Context, f Filter) ([]Record, string, error) {
	p := db.ListTeamAuditParams{FromAt: f.From, Action: f.Action, Result: f.Result, MaxRows: int32(f.Limit) + 1}
	var err error
	if p.BeforeAt, p.BeforeID, err = page.Before(f.Cursor, f.To); err != nil {
		return nil, "", err
	}
	for _, kind := range []string{User, Key, Host} {
		if u, err := id.Parse(prefixes[kind], f.Actor); err == nil {
			p.Actor = &u
		}
	}
	if p.Actor == nil {
		p.ActorKind = f.Actor
	}
	p.ObjectID = f.Object
	for kind := range prefixes {
		if is := inside(kind, f.Object); is != f.Object {
			p.ObjectID = is
		}
	}
	var rows []db.AuditRecord
	if f.Team != nil {
		p.TeamID = *f.Team
		rows, err = l.store.ListTeamAudit(ctx, p)
	} else {
		rows, err = l.store.ListAudit(ctx, db.ListAuditParams{
			BeforeAt: p.BeforeAt, BeforeID: p.BeforeID, FromAt: p.FromAt, ActorKind: p.ActorKind, Actor: p.Actor, Action: p.Action, ObjectID: p.ObjectID, Result: p.Result, MaxRows: p.MaxRows,
		})
	}
	if err != nil {
		return nil, "", fmt.Errorf("list audit records: %w", err)
	}
	rows, next := page.Cut(rows, f.Limit, func(r db.AuditRecord) string { return page.Time(r.At, r.ID) })
	records := make([]Record, len(rows))
	for i, r := range rows {
		records[i] = Record{
			ID: r.ID, At: r.At.UTC(), Team: r.TeamID, Actor: r.Actor, ActorID: r.ActorID, User: r.UserID, Action: r.Action, Object: r.Object, ObjectID: outside(r.Object, r.ObjectID),
			Address: r.Address, RequestID: r.RequestID, Result: r.Result, Code: r.Code, Count: r.Count,
		}
	}
	return records, next, nil
}

// Each calls f with every record that the filter lists, whatever its limit,
// until f fails.
func (l *Log) Each(ctx context.Context, f Filter, do func(Record) error) error {
	f.Limit = batch
	for {
		records, next, err := l.List(ctx, f)
		if err != nil {
			return err
		}
		for _, r := range records {
			if err := do(r); err != nil {
				return err
			}
		}
		if next == "" {
			return nil
		}
		f.Cursor = next
	}
}

// mostOfTeam is how many audit records a team keeps: its newest ones.
const mostOfTeam = 1_000_000

// Run forgets records that are old enough or too many, and settles what teams are charged
// for records, until ctx is done. Of several servers one does.
func (l *Log) Run(ctx context.Context) {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		if err := l.sweep(ctx); err != nil && ctx.Err() == nil {
			l.log.Warn("forget old audit records", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (l *Log) sweep(ctx context.Context) error {
	if l.keep > 0 {
		before := time.Now().Add(-l.keep)
		err := l.forget(ctx, math.MaxInt64, func(most int32) (int64, error) {
			return l.store.ForgetAudit(ctx, db.ForgetAuditParams{Before: before, MaxRows: most})
		})
		if err != nil {
			return err
		}
	}
	if mine, err := l.store.Lease(ctx, lease, 2*pruneEvery); err != nil || !mine {
		return err
	}
	return l.Settle(ctx, mostOfTeam)
}

// Settle counts the records that come with changes, audit records among them, for the
// teams that own them. Triggers have charged the teams already: Settle keeps these charges
// few, and right. Of the audit records of each team, it forgets the oldest if they are more
// than most.
func (l *Log) Settle(ctx context.Context, most int64) error {
	teams, err := l.store.CountRecords(ctx)
	if err != nil {
		return fmt.Errorf("count records: %w", err)
	}
	var errs []error
	for _, t := range teams {
		if t.Bytes != t.Settled {
			err := l.store.InTx(ctx, func(q *db.Queries) error {
				if err := q.LockTeamUsage(ctx, t.TeamID); err != nil {
					return err
				}
				return q.SettleRecords(ctx, t.TeamID)
			})
			if err != nil {
				errs = append(errs, fmt.Errorf("settle records: %w", err))
			}
		}
		err := l.forget(ctx, t.Audit-most, func(rows int32) (int64, error) {
			return l.store.ForgetTeamAudit(ctx, db.ForgetTeamAuditParams{TeamID: t.TeamID, MaxRows: rows})
		})
		errs = append(errs, err)
	}
	if err := l.store.ForgetCharges(ctx); err != nil {
		errs = append(errs, fmt.Errorf("forget charges of teams that are gone: %w", err))
	}
	return errors.Join(errs...)
}

// lease is the name of the lease of whoever sweeps.
const lease = "audit"

// forget removes that many records in batches, or fewer if there are no more.
func (l *Log) forget(ctx context.Context, excess int64, remove func(most int32) (int64, error)) error {
	for excess > 0 {
		if mine, err := l.store.Lease(ctx, lease, 2*pruneEvery); err != nil || !mine {
			return err
		}
		most := min(excess, batch)
		n, err := remove(int32(most))
		if err != nil || n < most {
			return err
		}
		excess -= n
	}
	return nil
}
