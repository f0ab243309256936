package rest

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

func stack() string { return string(debug.Stack()) }

// classify converts any error for the caller.
func classify(err error) *fault.Error {
	var f *fault.Error
	var long *http.MaxBytesError
	if why, ok := store.OverQuota(err); ok {
		return fault.Because(err, fault.QuotaExceeded, "%s", why)
	}
	switch {
	case errors.As(err, &f):
		return f
	case errors.As(err, &long):
		errors.As(tooLarge(long.Limit), &f)
		return f
	case store.TeamGone(err):
		return fault.Because(err, fault.NotFound, "no such team")
	case store.Unreachable(err):
		return fault.Because(err, fault.Unavailable, "the database does not respond")
	case errors.Is(err, context.DeadlineExceeded):
		return fault.Because(err, fault.Timeout, "the operation took too long")
	}
	return fault.Because(err, fault.Internal, "internal error")
}

// Fail responds with an error. It logs the reason; the response has only what the caller
// may know.
func (a *API) Fail(w http.ResponseWriter, r *http.Request, err error) {
	var ended *fault.Error
	if r.Context().Err() != nil && errors.As(context.Cause(r.Context()), &ended) {
		err = ended // The caller lost access.
	} else if r.Context().Err() != nil && errors.Is(err, context.Canceled) {
		a.log(r).Debug("client disconnected")
		if o := observed(r); o != nil {
			o.status = statusGone
		}
		return
	}
	f := classify(err)
	level := slog.LevelInfo
	if f.Code.Status() >= 500 {
		level = slog.LevelError
	}
	if o := observed(r); o != nil {
		o.code, o.reason, o.level = string(f.Code), err, level
	} else {
		a.log(r).Log(r.Context(), level, "request to a sandbox", "method", r.Method, "host", r.Host, "code", f.Code, "error", err)
	}
	if f.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(f.RetryAfter.Seconds()))))
	}
	var body rest.Error
	body.Error.Code, body.Error.Message = string(f.Code), f.Message
	answer(w, f.Code.Status(), body)
}

// answer responds with v as JSON.
func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff") // The proxy's errors need it too.
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	// The only possible error is that the client has disconnected.
	_ = enc.Encode(v)
}

// validate checks parameters and JSON bodies against the document. No other code checks
// their form.
func (a *API) validate(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m := routed(r)
		// authorize has checked the credentials, and readBody reads the body.
		open := *m.op
		open.Security = openapi3.NewSecurityRequirements()
		open.RequestBody = nil
		err := openapi3filter.ValidateRequest(r.Context(), &openapi3filter.RequestValidationInput{
			Request: r, PathParams: m.params,
			Route:   &routers.Route{Spec: a.spec, Path: m.path, PathItem: m.item, Method: r.Method, Operation: &open},
			Options: &openapi3filter.Options{SkipSettingDefaults: true},
		})
		if err != nil {
			err = invalid(err)
		} else {
			err = readBody(r, m.op, observed(r).held)
		}
		if err != nil {
			a.Fail(w, r, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// unbound converts the error of a malformed parameter for the caller.
func unbound(err error) error {
	name := "parameter"
	var format *rest.InvalidParamFormatError
	var many *rest.TooManyValuesForParamError
	switch {
	case errors.As(err, &format):
		name = format.ParamName
	case errors.As(err, &many):
		name = many.ParamName
	}
	return fault.Because(err, fault.InvalidArgument, "%s: malformed, or given more than once", name)
}

// invalid converts the validator's error for the caller: what is wrong and where, without
// the schema and without the value.
func invalid(err error) error {
	where, reason := "", "malformed"
	var re *openapi3filter.RequestError
	if errors.As(err, &re) {
		if re.Parameter != nil {
			where = re.Parameter.Name
		}
		if re.Reason != "" {
			reason = re.Reason
		}
	}
	if errors.Is(err, openapi3filter.ErrInvalidRequired) {
		reason = "missing"
	}
	var pe *openapi3filter.ParseError
	if errors.As(err, &pe) {
		reason = "malformed"
	}
	var se *openapi3.SchemaError
	if errors.As(err, &se) {
		reason = se.Reason
		if se.SchemaField == "not" {
			reason = "has another meaning"
		}
		if path := se.JSONPointer(); len(path) > 0 {
			if where != "" {
				where += "."
			}
			where += strings.Join(path, ".")
		}
	}
	if where == "" {
		where = "JSON"
	}
	// The validator's own text repeats the value, which may be a secret.
	return fault.New(fault.InvalidArgument, "%.200s: %.500s", where, reason)
}
