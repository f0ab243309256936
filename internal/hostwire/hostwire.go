// Package hostwire states the conventions between server, agent and guest daemon that are
// not in the definitions of the RPCs: headers and reasons of errors.
package hostwire

// DefaultDiskMiB is the default size of a template's file system, and so of a sandbox's
// disk. The database has it as default_disk_mib().
const DefaultDiskMiB = 5 << 10

// ErrorReason is the key in an error's metadata for the reason of a failure for which
// Connect has no code.
const ErrorReason = "Wrenn-Error-Reason"

// RequestID is a request header with the id of the client's request to which the call
// belongs, if there is one.
const RequestID = "X-Wrenn-Request-Id"

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

// Trace is a request header with the span to which the call belongs, as a W3C
// traceparent, if the trace is recorded.
const Trace = "X-Wrenn-Trace"

// Timing is a header with which the agent asks the guest daemon how long it took until
// it began to respond. The response has the header with "dur=" and milliseconds.
const Timing = "X-Wrenn-Timing"
