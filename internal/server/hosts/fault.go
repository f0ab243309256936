package hosts

import (
	"errors"
	"net"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// Definite says whether an error of a host means that what was asked for did
// not happen and will not.
func Definite(err error) bool {
	if !connect.IsWireError(err) {
		// Without a connection nothing was sent; else the host may have got the
		// call and still be at it.
		var failed *net.OpError
		return errors.As(err, &failed) && failed.Op == "dial"
	}
	switch connect.CodeOf(err) {
	case connect.CodeCanceled, connect.CodeDeadlineExceeded:
		return false
	}
	return true
}

// FaultIn is [Fault] for what a host does with a whole sandbox, such as "pause".
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
