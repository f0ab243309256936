// Package audit keeps the audit log: every change that a client requests through the API,
// whatever its result, and every change that hosts and the platform make by themselves.
// Records are never modified; they are deleted when they are old.
//
// The server writes the record of a requested change before it responds, so it
// acknowledges no change without a record. The record is not in the change's transaction,
// because most changes take as long as a call to a host. If the server dies between the
// two, a change that nobody was told of can lack its record. The record of a command is
// written while the command runs, and replaced before the response if the command fails
// ([Log.WriteEarly]). The database records spontaneous changes in the transaction that
// makes them.
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

// The kinds of actors.
const (
	User      = "user"
	Key       = "key"
	Host      = "host"
	Platform  = "platform"
	Anonymous = "anonymous"
)

// The results of a request. Refused: the caller was not permitted or the request was
// wrong. Failed: the server or a host could not do it.
const (
	OK      = "ok"
	Refused = "refused"
	Failed  = "failed"
)

const (
	pruneEvery = 10 * time.Minute
	// batch is how many records one query deletes, or reads for an export.
	batch = 1000
	// maxText bounds each text that a record copies from a request, in bytes.
	maxText = 200
)

// Record is one change, or one attempt at a change.
type Record struct {
	ID uuid.UUID
	At time.Time
	// Team owns the record; nil if only the platform does.
	Team *uuid.UUID
	// Actor is the kind of the actor, ActorID its id. If the actor is a key, User is the
	// user who created it.
	Actor   string
	ActorID *uuid.UUID
	User    *uuid.UUID
	// Action is the API's operation id, or the name of a spontaneous change.
	Action string
	// Object is the kind of the changed object, ObjectID its public id or its name; both
	// can be empty.
	Object, ObjectID string
	// Address is the client's address, RequestID the request's id.
	Address, RequestID string
	Result             string
	// Code is the error code if Result is not OK.
	Code string
	// Count is how many requests the record stands for: refused requests of one actor
	// with the same action and code share one record per minute.
	Count int64
}

// bucket returns the key under which refused requests share a record; nil if the request
// gets its own.
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

// prefixes maps the kind of an object to the prefix of its public id.
var prefixes = map[string]id.Kind{
	"sandbox": id.Sandbox, "team": id.Team, "user": id.User, "host": id.Host, "template": id.Template, "build": id.Build, "key": id.APIKey, "channel": id.Channel,
}

// inside returns an object's id as records store it: the UUID if name is a public id, and
// name otherwise.
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

// ActorName returns the actor's public id, or its kind if it has no id.
func (r Record) ActorName() string {
	if r.ActorID == nil {
		return r.Actor
	}
	return id.Format(prefixes[r.Actor], *r.ActorID)
}

// Log is the audit log.
type Log struct {
	store *store.Store
	keep  time.Duration
	log   *slog.Logger
}

// New returns the audit log in a store. If [Log.Run] runs, it deletes records older than
// keep (0: never).
func New(s *store.Store, keep time.Duration, log *slog.Logger) *Log { return &Log{s, keep, log} }

// Write adds a record. The database sets its time.
func (l *Log) Write(ctx context.Context, r Record) error {
	_, err := insert(ctx, l.store.Queries, r)
	return err
}

// insert adds a record and returns its id.
func insert(ctx context.Context, q *db.Queries, r Record) (uuid.UUID, error) {
	u, err := uuid.NewV7()
	if err == nil {
		err = q.InsertAudit(ctx, db.InsertAuditParams{
			ID: u, TeamID: r.Team, Actor: r.Actor, ActorID: r.ActorID, UserID: r.User, Action: r.Action, Object: r.Object, ObjectID: inside(r.Object, r.ObjectID),
			Address: r.Address, RequestID: r.RequestID, Result: r.Result, Code: r.Code, Bucket: r.bucket(time.Now()),
		})
	}
	if err != nil {
		return u, fmt.Errorf("write audit record: %w", err)
	}
	return u, nil
}

// Early is a record that is written while its request still runs.
type Early struct {
	log  *Log
	done chan struct{}
	// id and err are set before done is closed.
	id  uuid.UUID
	err error
}

// WriteEarly begins to write the record of a request that will probably succeed, so that
// the response need not wait for it. The end of ctx does not stop it, but it takes at most
// within. If the server dies before [Early.End], the record remains, and says what it was
// expected to say. The caller must call End.
func (l *Log) WriteEarly(ctx context.Context, within time.Duration, r Record) *Early {
	e := &Early{log: l, done: make(chan struct{})}
	go func() {
		defer close(e.done)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), within)
		defer cancel()
		e.id, e.err = insert(ctx, l.store.Queries, r)
	}()
	return e
}

// End waits until the record is written. If the request did not succeed, or writing
// failed, End writes r instead.
func (e *Early) End(ctx context.Context, r Record) error {
	<-e.done
	if e.err == nil && r.Result == OK {
		return nil
	}
	// After an error the record may be there nevertheless.
	return e.log.store.InTx(ctx, func(q *db.Queries) error {
		if err := q.DeleteAudit(ctx, e.id); err != nil {
			return fmt.Errorf("delete early audit record: %w", err)
		}
		_, err := insert(ctx, q, r)
		return err
	})
}

// Filter selects audit records. Zero fields match everything.
type Filter struct {
	// Team nil selects all teams and the platform.
	Team *uuid.UUID
	// Actor is the public id of a user, key or host, or a kind of actor.
	Actor string
	// Action, Object (a public id or a name) and Result equal those of the record.
	Action, Object, Result string
	From, To               time.Time
	// Cursor is what the previous page returned; empty for the first page.
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

// EachPage calls do with pages of all records that the filter selects, ignoring its limit,
// until do fails.
func (l *Log) EachPage(ctx context.Context, f Filter, do func([]Record) error) error {
	f.Limit = batch
	for {
		records, next, err := l.List(ctx, f)
		if err != nil {
			return err
		}
		if err := do(records); err != nil || next == "" {
			return err
		}
		f.Cursor = next
	}
}

// mostOfTeam is how many audit records a team keeps; the oldest beyond it are deleted.
const mostOfTeam = 1_000_000

// Run deletes old and excess records, and recounts what teams are charged for the rest, until
// ctx is done. A lease ensures that only one server at a time does this.
func (l *Log) Run(ctx context.Context) {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		if err := l.sweep(ctx); err != nil && ctx.Err() == nil {
			l.log.Warn("delete old audit records", "error", err)
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
	return l.Recount(ctx, mostOfTeam)
}

// Recount counts each team's records: audit records, runs of sandboxes, tags and
// deliveries. Triggers have already charged the teams when they wrote the records. Recount
// replaces these charges by one per team and corrects it. It deletes the oldest audit
// records of a team, or those of a user that count for no team, if there are more than
// most.
func (l *Log) Recount(ctx context.Context, most int64) error {
	teams, err := l.store.CountRecords(ctx)
	if err != nil {
		return fmt.Errorf("count records: %w", err)
	}
	var errs []error
	for _, t := range teams {
		if t.Bytes != t.Counted {
			err := l.store.InTx(ctx, func(q *db.Queries) error {
				if err := q.LockTeamUsage(ctx, t.TeamID); err != nil {
					return err
				}
				return q.RecountRecords(ctx, t.TeamID)
			})
			if err != nil {
				errs = append(errs, fmt.Errorf("recount records: %w", err))
			}
		}
		err := l.forget(ctx, t.Audit-most, func(rows int32) (int64, error) {
			return l.store.ForgetTeamAudit(ctx, db.ForgetTeamAuditParams{TeamID: t.TeamID, MaxRows: rows})
		})
		errs = append(errs, err)
	}
	users, err := l.store.CountUsersAudit(ctx, most)
	if err != nil {
		errs = append(errs, fmt.Errorf("count users' records: %w", err))
	}
	for _, u := range users {
		err := l.forget(ctx, u.Audit-most, func(rows int32) (int64, error) {
			return l.store.ForgetUserAudit(ctx, db.ForgetUserAuditParams{OfUser: u.OfUser, MaxRows: rows})
		})
		errs = append(errs, err)
	}
	if err := l.store.ForgetCharges(ctx); err != nil {
		errs = append(errs, fmt.Errorf("delete charges of deleted teams: %w", err))
	}
	return errors.Join(errs...)
}

// lease names the lease of the server that sweeps.
const lease = "audit"

// forget deletes up to excess records in batches, while this server holds the lease.
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
