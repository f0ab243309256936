// Package hostwire states the conventions between server, agent and guest daemon
// that the RPCs' definitions do not.
package hostwire

// DefaultDiskMiB is the size of a template's file system, and so of a sandbox's
// disk, unless another is asked for. The database has it as default_disk_mib().
const DefaultDiskMiB = 5 << 10

// ErrorReason is, in an error's metadata, why something failed, where Connect
// has no code for that.
const ErrorReason = "Wrenn-Error-Reason"

// RequestID is a request header with the id of the client's request that the call
// belongs to, if there is one.
const RequestID = "X-Wrenn-Request-Id"

// CaptureLimit is the [ErrorReason] of a sandbox that was captured as often as
// it can be.
const CaptureLimit = "capture_limit"

// GuestStart is the [ErrorReason] of a sandbox whose guest did not start. The
// guests of its template likely start on no other host either.
const GuestStart = "guest_start"

// GuestSlow is the [ErrorReason] of a sandbox whose guest did not start in time
// and did not say why: its host may be overloaded.
const GuestSlow = "guest_slow"

// CommandNotFound and CommandNotExecutable are the [ErrorReason] of a command that
// the guest does not have, or has and cannot execute. Shells exit with 127 and 126.
const (
	CommandNotFound      = "command_not_found"
	CommandNotExecutable = "command_not_executable"
)

// Trace is a request header with the span, in the form of a W3C traceparent, that the
// call belongs to, if that is recorded.
const Trace = "X-Wrenn-Trace"

// Timing is a header of the agent's requests that asks the guest daemon how long it
// took until it began to answer, and of the daemon's answer: dur= and milliseconds.
const Timing = "X-Wrenn-Timing"
