// Package hostwire states the conventions between server, agent and guest daemon that are
// not in the definitions of the RPCs: default sizes, the proxy's paths, the guest daemon's
// port, headers and reasons of errors.
package hostwire

import (
	"net/http"
	"strconv"
)

// ProxyPrefix begins the paths of requests to sandboxes' ports on an agent.
const ProxyPrefix = "/proxy/"

// ProxyPath returns the beginning of the paths of requests to a sandbox's port on an agent.
// The path on the port follows it. sandbox is the id with its prefix.
func ProxyPath(sandbox string, port int) string {
	return ProxyPrefix + sandbox + "/" + strconv.Itoa(port)
}

// GuestPort is the guest daemon's TCP port in every sandbox. A request to it needs the
// sandbox's access token.
const GuestPort = 49983

// AccessToken is the header of requests to [GuestPort] with the sandbox's access token.
const AccessToken = "X-Access-Token"

// Private begins the names of headers between server and agent. Both remove such headers
// from the requests of clients, and the agent from the responses of guests.
const Private = "X-Wrenn-"

// Authorization is a request header with the client's own Authorization header, which the
// agent passes to the guest. Authorization itself has the agent's token.
const Authorization = Private + "Authorization"

// Error is the response header that marks the agent's own errors. Its value is the
// error's code, which is the state of a sandbox that does not run.
const Error = Private + "Error"

// SandboxState is the key in an error's metadata for the state of a sandbox that does not
// run.
const SandboxState = "Wrenn-Sandbox-State"

// RefusedState returns the state of the sandbox if the agent refused a request because
// the sandbox does not run, and "" otherwise. The guest has not received a refused request,
// so the server can resume the sandbox and send the request again.
func RefusedState(resp *http.Response) string {
	if resp.StatusCode != http.StatusServiceUnavailable {
		return ""
	}
	return resp.Header.Get(Error)
}

// The sizes of a sandbox whose template has none. The disk is also the size of a new
// template's file system. TestDefaultSizes compares what cannot use these constants.
const (
	DefaultVCPUs     = 1
	DefaultMemoryMiB = 512
	DefaultDiskMiB   = 5 << 10
)

// ErrorReason is the key in an error's metadata for the reason of a failure for which
// Connect has no code.
const ErrorReason = "Wrenn-Error-Reason"

// RequestID is a request header with the id of the client's request to which the call
// belongs, if there is one.
const RequestID = Private + "Request-Id"

// CaptureLimit is the [ErrorReason] for a sandbox that cannot be captured again, because
// its disk has too many layers.
const CaptureLimit = "capture_limit"

// GuestStart is the [ErrorReason] for a sandbox whose guest did not start. Its template
// is probably at fault, so another host would not help.
const GuestStart = "guest_start"

// GuestSlow is the [ErrorReason] for a sandbox whose guest did not start in time, for no
// known reason. Its host may be overloaded.
const GuestSlow = "guest_slow"

// CommandNotFound and CommandNotExecutable are the [ErrorReason] for a command that does
// not exist in the guest, or cannot be executed. Shells exit with 127 and 126.
const (
	CommandNotFound      = "command_not_found"
	CommandNotExecutable = "command_not_executable"
)

// ProcessTimeout is a header of the guest daemon's Start: the number of seconds after which
// it kills the process with all its descendants.
const ProcessTimeout = "Process-Timeout"

// HoldStart is a header of the guest daemon's Start. If it is set, the guest daemon sends
// the start event together with the next event, for callers that only need the outcome.
const HoldStart = "Process-Hold-Start"

// Trace is a request header with the span to which the call belongs, as a W3C
// traceparent, if the trace is recorded.
const Trace = Private + "Trace"

// Timing is a header with which the agent asks the guest daemon how long it took until
// it began to respond. The response has the header with "dur=" and milliseconds.
const Timing = Private + "Timing"
