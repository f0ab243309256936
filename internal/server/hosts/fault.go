package hosts

import (
	"errors"
	"net"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// Definite reports whether an error of a call to a host means that the host did not and
// will not execute it.
func Definite(err error) bool {
	if !connect.IsWireError(err) {
		// Without a connection, the client sent nothing. Otherwise the host may still be
		// executing the call.
		var failed *net.OpError
		return errors.As(err, &failed) && failed.Op == "dial"
	}
	switch connect.CodeOf(err) {
	case connect.CodeCanceled, connect.CodeDeadlineExceeded:
		return false
	}
	return true
}

// FaultIn is [Fault] for an operation on a whole sandbox. doing is its verb, such as
// "pause".
func FaultIn(doing string, err error) error {
	told := Fault(err)
	switch {
	case fault.Is(told, fault.Internal):
		return fault.Because(err, fault.Internal, "the host could not %s the sandbox", doing)
	case fault.Is(told, fault.NoCapacity) && doing != "resume" && doing != "fork":
		var e *connect.Error
		errors.As(err, &e)
		return fault.Because(err, fault.NoSpace, "the host could not %s the sandbox: %s", doing, e.Message())
	}
	return told
}
