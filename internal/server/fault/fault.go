// Package fault has the errors whose code and message the control plane may show to the
// caller. All other errors are internal.
package fault

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"runtime/debug"
	"time"
)

// Code is the machine-readable code of an error in the public API.
type Code string

// The codes of the public API.
const (
	InvalidArgument     Code = "invalid_argument"
	Unauthenticated     Code = "unauthenticated"
	PermissionDenied    Code = "permission_denied"
	QuotaExceeded       Code = "quota_exceeded"
	NotFound            Code = "not_found"
	MethodNotAllowed    Code = "method_not_allowed"
	Conflict            Code = "conflict"
	SandboxPaused       Code = "sandbox_paused"
	CaptureLimit        Code = "capture_limit"
	CommandNotFound     Code = "command_not_found"
	NotExecutable       Code = "command_not_executable"
	PayloadTooLarge     Code = "payload_too_large"
	RangeNotSatisfiable Code = "range_not_satisfiable"
	Unprocessable       Code = "unprocessable"
	RequestTimeout      Code = "request_timeout"
	RateLimited         Code = "rate_limited"
	Internal            Code = "internal"
	BadGateway          Code = "bad_gateway"
	NoCapacity          Code = "no_capacity"
	HostUnreachable     Code = "host_unreachable"
	Unavailable         Code = "unavailable"
	Timeout             Code = "timeout"
	Unimplemented       Code = "unimplemented"
	NoSpace             Code = "no_space"
)

// Status returns the HTTP status that goes with the code.
func (c Code) Status() int {
	switch c {
	case InvalidArgument:
		return http.StatusBadRequest
	case Unauthenticated:
		return http.StatusUnauthorized
	case PermissionDenied, QuotaExceeded:
		return http.StatusForbidden
	case NotFound:
		return http.StatusNotFound
	case MethodNotAllowed:
		return http.StatusMethodNotAllowed
	case Conflict, SandboxPaused, CaptureLimit:
		return http.StatusConflict
	case PayloadTooLarge:
		return http.StatusRequestEntityTooLarge
	case RangeNotSatisfiable:
		return http.StatusRequestedRangeNotSatisfiable
	case RequestTimeout:
		return http.StatusRequestTimeout
	case Unprocessable, CommandNotFound, NotExecutable:
		return http.StatusUnprocessableEntity
	case RateLimited:
		return http.StatusTooManyRequests
	case BadGateway:
		return http.StatusBadGateway
	case NoCapacity, HostUnreachable, Unavailable:
		return http.StatusServiceUnavailable
	case Timeout:
		return http.StatusGatewayTimeout
	case Unimplemented:
		return http.StatusNotImplemented
	case NoSpace:
		return http.StatusInsufficientStorage
	case Internal:
	}
	return http.StatusInternalServerError
}

// Error is an error to show to the caller.
type Error struct {
	Code    Code
	Message string
	// RetryAfter is when a retry may succeed; 0: unknown.
	RetryAfter time.Duration
	// cause is logged and never shown.
	cause error
}

func (e *Error) Error() string {
	if e.cause != nil {
		return fmt.Sprintf("%s: %s: %v", e.Code, e.Message, e.cause)
	}
	return fmt.Sprintf("%s: %s", e.Code, e.Message)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.cause }

// New returns an error with a message for the caller.
func New(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Because is [New] with a cause, which is logged and not shown.
func Because(cause error, code Code, format string, args ...any) *Error {
	e := New(code, format, args...)
	e.cause = cause
	return e
}

// Body returns the error for a request body that ended early or arrived too slowly.
func Body(err error) *Error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return Because(err, RequestTimeout, "the request body arrived too slowly")
	}
	return Because(err, InvalidArgument, "body: broke off")
}

// Is reports whether err is or wraps an [Error] with the code.
func Is(err error, code Code) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == code
}

// Panic is the error that [Guard] returns for a panic.
type Panic struct{ Value any }

func (p *Panic) Error() string { return fmt.Sprintf("panic: %v", p.Value) }

// Guard calls f and returns its error. It logs a panic of f with its stack and returns a
// [*Panic], so that a panic ends only f.
func Guard(log *slog.Logger, f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			log.Error("panic", "value", v, "stack", string(debug.Stack()))
			err = &Panic{v}
		}
	}()
	return f()
}
