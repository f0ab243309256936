package rest

import (
	"cmp"
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/requestid"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/tracing"
)

// statusGone is the recorded status if the client disconnected before the response.
const statusGone = 499

// Observation describes a completed request.
type Observation struct {
	// Method and Route are from a bounded set. Unknown ones are "other".
	Method, Route string
	Status        int
	Took          time.Duration
	// Lasts reports that the client or the guest determined the duration.
	Lasts bool
}

// observation collects what is known about a request. It is the request's ResponseWriter,
// which sees the status.
type observation struct {
	http.ResponseWriter
	status int
	// match is the operation, once it is known.
	match match
	// who is the caller, as far as known.
	who auth.Principal
	// code is the code of the error in the response, reason the error itself, and level
	// the level of the log record.
	code   string
	reason error
	level  slog.Level
	// host is the host whose agent called.
	host uuid.UUID
	// held is the memory that the request takes, once the caller is known.
	held *budget.Reservation
	// recorder writes the audit record; nil: the request has none.
	recorder *recorder
}

type observationKey struct{}

func observed(r *http.Request) *observation {
	o, _ := r.Context().Value(observationKey{}).(*observation)
	return o
}

// WriteHeader records the status.
func (o *observation) WriteHeader(status int) {
	if o.status == 0 && status >= 200 || status == http.StatusSwitchingProtocols {
		o.status = status
	}
	o.ResponseWriter.WriteHeader(status)
}

func (o *observation) Write(b []byte) (int, error) {
	if o.status == 0 {
		o.status = http.StatusOK
	}
	return o.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController reach the connection.
func (o *observation) Unwrap() http.ResponseWriter { return o.ResponseWriter }

// observe logs and counts every request.
func (a *API) observe(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o := &observation{ResponseWriter: w}
		w.Header().Set(requestid.Header, requestid.From(r.Context()))
		harmless(w.Header())
		ctx := context.WithValue(r.Context(), observationKey{}, o)
		ctx = context.WithValue(ctx, chi.RouteCtxKey, chi.NewRouteContext())
		begun := time.Now()
		defer func() {
			took := time.Since(begun)
			status := o.status
			if status == 0 {
				status = statusGone
			}
			seen := Observation{Method: "other", Route: "other", Status: status, Took: took}
			if o.match.op != nil {
				seen.Method, seen.Route = r.Method, o.match.path
				seen.Lasts = propertiesOf(o.match.op).lasts
			}
			if a.Observe != nil {
				a.Observe(seen)
			}
			if span := tracing.Of(ctx); span.On() {
				describe(span, o, seen)
			}
			level := o.level
			if seen.Route == "/health" && o.reason == nil {
				level = slog.LevelDebug
			}
			attrs := []any{"method", r.Method, "route", seen.Route, "status", status, "took", took}
			if o.who.Team != uuid.Nil {
				attrs = append(attrs, "team_id", id.Format(id.Team, o.who.Team))
			}
			if sandbox := o.match.params["sandbox_id"]; sandbox != "" {
				attrs = append(attrs, "sandbox_id", sandbox)
			}
			if o.reason != nil {
				attrs = append(attrs, "code", o.code, "error", o.reason)
			}
			a.log(r).Log(ctx, level, "request", attrs...)
		}()
		next.ServeHTTP(o, r.WithContext(ctx))
	})
}

// describe sets a request's span attributes.
func describe(span tracing.Span, o *observation, seen Observation) {
	span.Name(seen.Method + " " + seen.Route)
	span.Set("http.request.method", seen.Method)
	span.Set("http.route", seen.Route)
	span.SetInt("http.response.status_code", seen.Status)
	if o.who.Team != uuid.Nil {
		span.Set("wrenn.team_id", id.Format(id.Team, o.who.Team))
	}
	if sandbox, err := id.Parse(id.Sandbox, o.match.params["sandbox_id"]); err == nil {
		span.Set("wrenn.sandbox_id", id.Format(id.Sandbox, sandbox))
	}
	if seen.Status >= http.StatusInternalServerError {
		span.Fail(cmp.Or(o.code, "internal"))
	} else if o.code != "" {
		span.Set("error.type", o.code)
	}
}

// harmless sets headers that keep browsers from using a response as a page, a script, or
// a part of another origin's page, whatever bytes of a guest it contains. The service's
// own pages set other policies.
func harmless(h http.Header) {
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'; sandbox")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Referrer-Policy", "no-referrer")
}

// log returns the logger of a request.
func (a *API) log(r *http.Request) *slog.Logger {
	return a.Log.With("request_id", requestid.From(r.Context()))
}
