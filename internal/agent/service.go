package agent

import (
	"context"
	"errors"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/oci"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
)

const (
	// maxFile bounds a file that is read or written in one message.
	maxFile = 32 << 20
	// chunk is the content of one message of a stream, in bytes.
	chunk = 256 << 10

	maxPath      = 4096
	maxName      = 256
	maxCopies    = 256
	maxUser      = 256
	maxToken     = 512
	maxArguments = 2 << 20 // bytes of a command's arguments and environment together
	maxEnvs      = 1 << 20
	maxCommand   = 30 * 24 * time.Hour
)

// service implements the Connect service HostAgent.
type service struct{ *Agent }

var _ hostagentv1connect.HostAgentHandler = (*service)(nil)

// fault turns err into a Connect error, and logs it if its code is internal. doing
// names the operation for the log.
func (s *service) fault(ctx context.Context, doing string, err error) error {
	if err == nil {
		return nil
	}
	var ce *connect.Error
	isConnect, notStarted := errors.As(err, &ce), errors.Is(err, sandbox.ErrGuest) || errors.Is(err, sandbox.ErrSlow)
	lost := notStarted || isConnect && (ce.Code() == connect.CodeDeadlineExceeded || ce.Code() == connect.CodeUnavailable)
	if lost && !guest.Said(err) && s.sandboxes.DiskFull() {
		// QEMU stops a machine that cannot write to its disk, so a silent guest
		// most likely means a full disk.
		return connect.NewError(connect.CodeResourceExhausted, clienterr.New("this host has no disk space left"))
	}
	if isConnect && !notStarted {
		return ce
	}
	code := connect.CodeInternal
	for _, k := range []struct {
		kind error
		code connect.Code
	}{
		{sandbox.ErrInvalid, connect.CodeInvalidArgument},
		{sandbox.ErrNotFound, connect.CodeNotFound},
		{sandbox.ErrExists, connect.CodeAlreadyExists},
		{sandbox.ErrState, connect.CodeFailedPrecondition},
		{sandbox.ErrInUse, connect.CodeAborted},
		{sandbox.ErrExhausted, connect.CodeResourceExhausted},
		{sandbox.ErrCaptures, connect.CodeFailedPrecondition},
		{sandbox.ErrUnread, connect.CodeUnavailable},
		{sandbox.ErrClosing, connect.CodeUnavailable},
		{sandbox.ErrStart, connect.CodeUnavailable},
		{sandbox.ErrGuest, connect.CodeUnavailable},
		{sandbox.ErrSlow, connect.CodeUnavailable},
		{oci.ErrRefused, connect.CodeInvalidArgument},
		{oci.ErrDenied, connect.CodePermissionDenied},
		{oci.ErrNotFound, connect.CodeNotFound},
		{context.Canceled, connect.CodeCanceled},
		{context.DeadlineExceeded, connect.CodeDeadlineExceeded},
		{journal.ErrClosed, connect.CodeUnavailable},
	} {
		if errors.Is(err, k.kind) {
			code = k.code
			break
		}
	}
	if code == connect.CodeInternal {
		s.log.ErrorContext(ctx, doing, "error", err)
	}
	ce = connect.NewError(code, err)
	switch {
	case errors.Is(err, sandbox.ErrCaptures):
		ce.Meta().Set(hostwire.ErrorReason, hostwire.CaptureLimit)
	case errors.Is(err, sandbox.ErrSlow):
		ce.Meta().Set(hostwire.ErrorReason, hostwire.GuestSlow)
	case notStarted:
		ce.Meta().Set(hostwire.ErrorReason, hostwire.GuestStart)
	}
	var state *sandbox.StateError
	if errors.As(err, &state) {
		ce.Meta().Set(hostwire.SandboxState, string(state.State))
	}
	return ce
}

func invalid(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, clienterr.New(format, args...))
}

func parse(k id.Kind, what, s string) (uuid.UUID, error) {
	u, err := id.Parse(k, s)
	if err != nil {
		return uuid.Nil, invalid("%s: %v", what, err)
	}
	return u, nil
}

// use acquires the sandbox that a request names. The caller must end the use.
func (s *service) use(ctx context.Context, sandboxID string) (*sandbox.Use, error) {
	u, err := parse(id.Sandbox, "sandbox_id", sandboxID)
	if err != nil {
		return nil, err
	}
	use, err := s.sandboxes.Use(ctx, u)
	return use, s.fault(ctx, "use sandbox", err)
}

// useError returns the sandbox's own error if that explains err: the sandbox was paused or
// ended during the call, or its guest is known not to answer. Otherwise it returns err.
func useError(use *sandbox.Use, err error) error {
	if err != nil && use.Context.Err() != nil && errors.Is(context.Cause(use.Context), sandbox.ErrState) {
		return context.Cause(use.Context)
	}
	var ce *connect.Error
	if errors.As(err, &ce) && !guest.Said(err) && (ce.Code() == connect.CodeUnavailable || ce.Code() == connect.CodeDeadlineExceeded) {
		if silence := use.Silence(); silence != nil {
			return connect.NewError(ce.Code(), silence)
		}
	}
	return err
}

// callError is useError for a call that changes something. If a pause interrupted the
// call, callError omits the state header, on which the control plane repeats a call.
func callError(use *sandbox.Use, err error) error {
	err = useError(use, err)
	var state *sandbox.StateError
	if errors.As(err, &state) && state.State != sandbox.Stopping {
		return connect.NewError(connect.CodeFailedPrecondition, clienterr.New("the sandbox became %s during the call, which may have taken effect", state.State))
	}
	return err
}

func checkEnvs(envs map[string]string, most int) error {
	size := 0
	for k, v := range envs {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(v, 0) {
			return invalid("envs: %.100q cannot be set", k)
		}
		size += len(k) + len(v) + 2
	}
	if size > most {
		return invalid("envs: %d bytes are more than %d", size, most)
	}
	return nil
}

func checkUser(user string) error {
	if len(user) > maxUser || strings.ContainsFunc(user, func(r rune) bool { return r < ' ' || r == ':' || r == 0x7f }) {
		return invalid("user: %.100q is not a user name", user)
	}
	return nil
}
