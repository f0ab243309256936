package rest

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/requestid"
	"github.com/wrenn-dev/wrenn/internal/server/audit"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// recordWithin bounds how long a response waits for its audit record.
const recordWithin = 5 * time.Second

// open reports whether an operation needs no authentication.
func open(op *openapi3.Operation) bool { return op.Security != nil && len(*op.Security) == 0 }

// audit records every requested change before the response.
func (a *API) audit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m := routed(r)
		if !propertiesOf(m.op).recorded {
			next.ServeHTTP(w, r)
			return
		}
		rec := &recorder{ResponseWriter: w, api: a, r: r, op: m.op}
		observed(r).recorder = rec
		defer func() {
			if rec.began {
				return
			}
			// The handler panicked or the client left.
			code := "canceled"
			if r.Context().Err() == nil {
				code = string(fault.Internal)
			}
			if err := rec.write(audit.Failed, code); err != nil {
				a.log(r).Error("write audit record", "error", err)
			}
		}()
		next.ServeHTTP(rec, r)
	})
}

// ofPeople reports whether an operation can change what keys may do. Keys of teams
// cannot call such operations.
func ofPeople(access auth.Access) bool {
	return access.Role == auth.Platform || access.Role != auth.Anybody && len(access.Scopes) == 0
}

// recorder writes a request's audit record just before the response. If that fails, it
// replaces the response with an error.
type recorder struct {
	http.ResponseWriter
	api *API
	r   *http.Request
	op  *openapi3.Operation
	// began: the response has begun. mute: discard the handler's response.
	began, mute bool
	// early is the record if it is written before the response; nil: it is not.
	early *audit.Early
}

// recordEarly begins to write a request's audit record, which says that the request
// succeeded. If it does not, the recorder replaces the record before the response.
func recordEarly(r *http.Request) {
	rec := observed(r).recorder
	if rec == nil || rec.early != nil {
		return
	}
	if record, ok := rec.record(audit.OK, ""); ok {
		rec.early = rec.api.Audit.WriteEarly(r.Context(), recordWithin, record)
	}
}

// Unwrap lets http.ResponseController reach the connection.
func (rec *recorder) Unwrap() http.ResponseWriter { return rec.ResponseWriter }

// WriteHeader writes the record, then the header.
func (rec *recorder) WriteHeader(status int) {
	if rec.mute {
		return
	}
	if !rec.began && (status >= 200 || status == http.StatusSwitchingProtocols) {
		rec.began = true
		result, code := audit.OK, observed(rec.r).code
		if status >= 400 || code != "" { // A redirect carries its error in the URL.
			result = audit.Refused
		}
		if status >= 500 {
			result = audit.Failed
		}
		if result == audit.OK && ofPeople(rec.api.access[rec.op]) {
			rec.api.Keys.Forget() // Somebody may have lost access; the database's notification arrives later.
		}
		if err := rec.write(result, code); err != nil {
			rec.mute = true
			rec.Header().Del("Location")
			rec.api.Fail(rec.ResponseWriter, rec.r, fault.Because(err, fault.Unavailable, "the change could not be recorded, but may have been made"))
			return
		}
	}
	rec.ResponseWriter.WriteHeader(status)
}

func (rec *recorder) Write(b []byte) (int, error) {
	if !rec.began {
		rec.WriteHeader(http.StatusOK)
	}
	if rec.mute {
		return len(b), nil
	}
	return rec.ResponseWriter.Write(b)
}

// record returns the record of a request with a result; ok is false if there is none.
// Unauthenticated callers of operations that need authentication have none, because they
// change nothing and could fill the log.
func (rec *recorder) record(result, code string) (record audit.Record, ok bool) {
	o := observed(rec.r)
	record = audit.Record{Actor: audit.Anonymous, Action: rec.op.OperationID, Address: rec.api.addressText(rec.r), RequestID: requestid.From(rec.r.Context()), Result: result, Code: code}
	switch {
	case o.host != uuid.Nil:
		record.Actor, record.ActorID = audit.Host, &o.host
	default:
		actor(&record, o)
		if record.Actor == audit.Anonymous && (!open(rec.op) || result != audit.OK && code == "rate_limited") {
			return record, false
		}
	}
	if strings.HasPrefix(routed(rec.r).path, "/v1/admin/") {
		record.Team = nil
	}
	record.Object, record.ObjectID = object(rec.r, rec.Header().Get("Location"))
	return record, true
}

// write writes the record, unless the request has none.
func (rec *recorder) write(result, code string) error {
	record, ok := rec.record(result, code)
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(rec.r.Context()), recordWithin)
	defer cancel()
	if code == "quota_exceeded" && record.Team != nil {
		if err := rec.api.Channels.Quota(ctx, *record.Team, ""); err != nil {
			rec.api.log(rec.r).Warn("emit event for a reached quota", "error", err)
		}
	}
	if rec.early != nil {
		return rec.early.End(ctx, record)
	}
	return rec.api.Audit.Write(ctx, record)
}

// actor sets the record's actor.
func actor(r *audit.Record, o *observation) {
	switch {
	case o.who.Key != uuid.Nil:
		r.Actor, r.ActorID = audit.Key, &o.who.Key
		if o.who.User != uuid.Nil {
			r.User = &o.who.User
		}
	case o.who.User != uuid.Nil:
		r.Actor, r.ActorID = audit.User, &o.who.User
	}
	if o.who.Team != uuid.Nil {
		r.Team = &o.who.Team
	}
}

// kinds maps collections in paths to kinds of objects.
var kinds = map[string]string{"sandboxes": "sandbox", "snapshots": "template", "members": "user"}

// inner has the collections whose objects' names are only unique within their parent.
var inner = map[string]bool{"tags": true, "contexts": true}

// object returns the object of a request: the one it created, from the response's
// Location, or the last one in its path.
func object(r *http.Request, location string) (kind, name string) {
	if parts := strings.Split(location, "/"); len(parts) > 2 {
		kind, name = parts[len(parts)-2], parts[len(parts)-1]
	} else {
		m := routed(r)
		named := false
		parts := strings.Split(strings.Trim(m.path, "/"), "/")
		for i, part := range parts {
			// A verb may follow the last named object.
			if p, ok := param(part); ok && i > 0 && !strings.HasPrefix(parts[i-1], "{") {
				of := ""
				if inner[parts[i-1]] {
					of = name + "/"
				}
				kind, name, named = parts[i-1], of+m.params[p], true
			} else if !named {
				kind = part
			}
		}
	}
	if k, ok := kinds[kind]; ok {
		return k, name
	}
	return strings.TrimSuffix(kind, "s"), name
}

// ListAudit answers GET /v1/audit.
func (a *API) ListAudit(w http.ResponseWriter, r *http.Request, p rest.ListAuditParams) {
	team := caller(r).Team
	a.listAudit(w, r, &team, p)
}

// ListAllAudit answers GET /v1/admin/audit.
func (a *API) ListAllAudit(w http.ResponseWriter, r *http.Request, p rest.ListAllAuditParams) {
	a.listAudit(w, r, nil, rest.ListAuditParams{
		Actor: p.Actor, Action: p.Action, Object: p.Object, Result: p.Result, From: p.From, To: p.To, Limit: p.Limit, Cursor: p.Cursor,
		Format: (*rest.ListAuditParamsFormat)(p.Format),
	})
}

func (a *API) listAudit(w http.ResponseWriter, r *http.Request, team *uuid.UUID, p rest.ListAuditParams) {
	f := audit.Filter{
		Team: team, Actor: or(p.Actor, ""), Action: or(p.Action, ""), Object: or(p.Object, ""), Result: string(or(p.Result, "")),
		From: or(p.From, time.Time{}), To: or(p.To, time.Time{}), Cursor: or(p.Cursor, ""), Limit: or(p.Limit, defaultLimit),
	}
	if format := string(or(p.Format, "json")); format != "json" {
		a.exportAudit(w, r, f, format)
		return
	}
	records, next, err := a.Audit.List(r.Context(), f)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	list := rest.AuditList{Records: make([]rest.AuditRecord, len(records)), NextCursor: some(next)}
	for i, record := range records {
		list.Records[i] = auditRecord(record)
	}
	answer(w, http.StatusOK, list)
}

func auditRecord(r audit.Record) rest.AuditRecord {
	out := rest.AuditRecord{
		ID: r.ID, At: r.At, ActorKind: rest.AuditRecordActorKind(r.Actor), Actor: r.ActorName(), Action: r.Action, ObjectKind: r.Object, Object: r.ObjectID,
		Address: r.Address, RequestID: r.RequestID, Result: rest.AuditResult(r.Result), Code: r.Code, Count: r.Count,
	}
	if r.Team != nil {
		out.TeamID = some(id.Format(id.Team, *r.Team))
	}
	if r.User != nil {
		out.UserID = some(id.Format(id.User, *r.User))
	}
	return out
}

// exportAudit streams all records. If it fails midway, it closes the connection, so that
// the client does not take a part for the whole.
func (a *API) exportAudit(w http.ResponseWriter, r *http.Request, f audit.Filter, format string) {
	begun := false
	begin := func() {
		if begun {
			return
		}
		begun = true
		kind := "application/x-ndjson"
		if format == "csv" {
			kind = "text/csv; charset=utf-8"
		}
		w.Header().Set("Content-Type", kind)
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("Content-Disposition", `attachment; filename="audit.`+format+`"`)
		w.WriteHeader(http.StatusOK)
	}
	if r.Method == http.MethodHead {
		f.Limit = 1
		if _, _, err := a.Audit.List(r.Context(), f); err != nil {
			a.Fail(w, r, err)
			return
		}
		begin()
		return
	}
	enc, table := json.NewEncoder(w), csv.NewWriter(w)
	enc.SetEscapeHTML(false)
	head := func() error {
		begin()
		if format != "csv" {
			return nil
		}
		return table.Write([]string{"at", "team_id", "actor_kind", "actor", "user_id", "action", "object_kind", "object", "result", "code", "address", "request_id", "id", "count"})
	}
	line := func(record audit.Record) error {
		if !begun {
			if err := head(); err != nil {
				return err
			}
		}
		out := auditRecord(record)
		if format != "csv" {
			return enc.Encode(out)
		}
		return table.Write([]string{
			out.At.Format(time.RFC3339Nano), or(out.TeamID, ""), string(out.ActorKind), out.Actor, or(out.UserID, ""), cell(out.Action), cell(out.ObjectKind), cell(out.Object),
			string(out.Result), out.Code, out.Address, cell(out.RequestID), out.ID.String(), strconv.FormatInt(out.Count, 10),
		})
	}
	held := observed(r).held
	err := a.Audit.EachPage(r.Context(), f, func(records []audit.Record) error {
		defer held.Release() // the page's rows
		for _, record := range records {
			if err := line(record); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && !begun {
		err = head()
	}
	if err == nil {
		table.Flush()
		err = table.Error()
	}
	if err != nil && !begun {
		a.Fail(w, r, err)
		return
	}
	if err != nil {
		a.log(r).Warn("export audit records", "error", err)
		panic(http.ErrAbortHandler)
	}
}

// cell keeps spreadsheets from interpreting text as a formula.
func cell(text string) string {
	if text != "" && strings.ContainsRune("=+-@\t\r", rune(text[0])) {
		return "'" + text
	}
	return text
}
