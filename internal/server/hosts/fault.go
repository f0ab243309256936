package hosts

import (
	"errors"
	"net"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/text"
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

// maxText bounds a text of a host, in bytes.
const maxText = 8 << 10

// Text returns what a host says as valid text of bounded length. The host is not trusted,
// and such texts are stored and sent to clients.
func Text(said string) string { return text.Clean(said, maxText) }

// Message returns the [Text] of a host's error.
func Message(err error) string {
	var e *connect.Error
	if !errors.As(err, &e) {
		return ""
	}
	return Text(e.Message())
}

// FaultIn is [Fault] for an operation on a whole sandbox. doing is its verb, such as
// "pause".
func FaultIn(doing string, err error) error {
	told := Fault(err)
	switch {
	case fault.Is(told, fault.Internal):
		return fault.Because(err, fault.Internal, "the host could not %s the sandbox", doing)
	case fault.Is(told, fault.NoCapacity) && doing != "resume" && doing != "fork":
		return fault.Because(err, fault.NoSpace, "the host could not %s the sandbox: %s", doing, Message(err))
	}
	return told
}
