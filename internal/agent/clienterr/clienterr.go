// Package clienterr marks errors whose text was written for clients. The agent sends no
// other text to the control plane, which passes it on to clients. So a new error reveals
// nothing about the host until somebody writes a text for clients.
package clienterr

import (
	"errors"
	"fmt"

	"connectrpc.com/connect"
)

// Error is an error with a text for clients, and a cause for the log.
type Error struct {
	text  string
	cause error
}

// New returns an error with a text for clients.
func New(format string, args ...any) error { return &Error{text: fmt.Sprintf(format, args...)} }

// Because is New with a cause, which only the log shows.
func Because(cause error, format string, args ...any) error {
	return &Error{fmt.Sprintf(format, args...), cause}
}

// Error returns the text and, for the log, the cause.
func (e *Error) Error() string {
	if e.cause == nil {
		return e.text
	}
	return e.text + ": " + e.cause.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.cause }

// ForClients returns the text for clients.
func (e *Error) ForClients() string { return e.text }

// Text returns err's text for clients: that of the outermost error in its chain with
// a method ForClients.
func Text(err error) (text string, ok bool) {
	var t interface {
		error
		ForClients() string
	}
	if !errors.As(err, &t) {
		return "", false
	}
	return t.ForClients(), true
}

// general has the texts for clients of errors without a text of their own, by code.
var general = map[connect.Code]string{
	connect.CodeCanceled:           "the request was cancelled",
	connect.CodeInvalidArgument:    "the request is invalid",
	connect.CodeDeadlineExceeded:   "the call took too long",
	connect.CodeNotFound:           "not found",
	connect.CodeAlreadyExists:      "already exists",
	connect.CodePermissionDenied:   "permission denied",
	connect.CodeResourceExhausted:  "the host has too little memory or disk space",
	connect.CodeFailedPrecondition: "not possible in this state",
	connect.CodeAborted:            "the sandbox was in use",
	connect.CodeUnavailable:        "the host cannot do this now",
	connect.CodeUnauthenticated:    "unauthenticated",
}

// Shown returns err as clients may see it, with its code and metadata. hid reports
// whether it replaced err's text.
func Shown(err *connect.Error) (shown *connect.Error, hid bool) {
	text, ok := Text(err)
	if !ok {
		if text, ok = general[err.Code()]; !ok {
			text = "the host failed"
		}
	}
	if text == err.Message() {
		return err, false
	}
	shown = connect.NewError(err.Code(), errors.New(text))
	for name, values := range err.Meta() {
		shown.Meta()[name] = values
	}
	return shown, true
}
