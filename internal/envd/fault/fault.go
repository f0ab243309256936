// Package fault translates errors to Connect codes and HTTP statuses.
package fault

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/envd/account"
)

// Code returns the Connect code for err.
func Code(err error) connect.Code {
	var ce *connect.Error
	is := func(targets ...error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return true
			}
		}
		return false
	}
	switch {
	case errors.As(err, &ce):
		return ce.Code()
	case is(context.Canceled):
		return connect.CodeCanceled
	case is(context.DeadlineExceeded):
		return connect.CodeDeadlineExceeded
	case is(unix.ENOTEMPTY, unix.EBUSY, unix.EXDEV, unix.ETXTBSY, unix.EPIPE, fs.ErrClosed):
		return connect.CodeFailedPrecondition
	case is(account.ErrUnknown, unix.ENOTDIR, unix.EISDIR, unix.EINVAL, unix.ENAMETOOLONG, unix.ELOOP, unix.E2BIG, unix.ENOEXEC, fs.ErrInvalid):
		return connect.CodeInvalidArgument
	case is(fs.ErrNotExist):
		return connect.CodeNotFound
	case is(fs.ErrExist):
		return connect.CodeAlreadyExists
	case is(fs.ErrPermission, unix.EROFS):
		return connect.CodePermissionDenied
	case is(unix.ENOSPC, unix.EDQUOT, unix.EFBIG, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EAGAIN):
		return connect.CodeResourceExhausted
	}
	return connect.CodeInternal
}

// Connect returns err as a Connect error, or nil for nil.
func Connect(err error) error {
	if err == nil {
		return nil
	}
	var ce *connect.Error
	if errors.As(err, &ce) {
		return ce
	}
	return connect.NewError(Code(err), err)
}

// Status returns the HTTP status for err.
func Status(err error) int {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return http.StatusInsufficientStorage
	}
	switch Code(err) {
	case connect.CodeInvalidArgument:
		return http.StatusBadRequest
	case connect.CodeUnauthenticated:
		return http.StatusUnauthorized
	case connect.CodePermissionDenied:
		return http.StatusForbidden
	case connect.CodeNotFound:
		return http.StatusNotFound
	case connect.CodeAlreadyExists, connect.CodeFailedPrecondition:
		return http.StatusConflict
	case connect.CodeResourceExhausted:
		return http.StatusTooManyRequests
	case connect.CodeUnavailable:
		return http.StatusServiceUnavailable
	case connect.CodeDeadlineExceeded:
		return http.StatusGatewayTimeout
	case connect.CodeUnimplemented:
		return http.StatusNotImplemented
	}
	return http.StatusInternalServerError
}

// Write responds to a plain HTTP request with a status and a body such as
// {"code":"not_found","message":"…"}, which Connect clients also understand.
func Write(w http.ResponseWriter, status int, code connect.Code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}{code.String(), message})
}

// WriteError responds to a plain HTTP request with the status and code for err.
func WriteError(w http.ResponseWriter, err error) {
	message := err.Error()
	if ce := (*connect.Error)(nil); errors.As(err, &ce) {
		message = ce.Message() // the code has a field of its own
	}
	Write(w, Status(err), Code(err), message)
}
