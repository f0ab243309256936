package builds

import (
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// Limits on a step's stored output, in bytes: its beginning and, if it is longer, its
// end.
const (
	maxOutput = 128 << 10
	maxTail   = 8 << 10
	// maxLog bounds the Output of all steps of a build together. With the Tails, that is
	// less than the database charges for a log that it has not measured yet
	// (build_bytes).
	maxLog = 4 << 20
	// maxSteps bounds the steps of a build.
	maxSteps = 1000
)

// A team keeps its newest finished builds, up to this number and this size in bytes.
const (
	mostBuilds     = 500
	mostBuildBytes = 128 << 20
)

// The states of a step.
const (
	stepPending   = "pending"
	stepRunning   = "running"
	stepSucceeded = "succeeded"
	stepFailed    = "failed"
	stepCached    = "cached" // the layer that the build started from includes it
	stepSkipped   = "skipped"
	stepCancelled = "cancelled"
)

// Step is the state and the log of one step of a build.
type Step struct {
	Number int    `json:"number"` // from 1
	Phase  string `json:"phase"`
	Text   string `json:"text"`
	State  string `json:"state"`
	// Output is the beginning of what the step printed. If it is Truncated, Tail is the
	// end.
	Output    string `json:"output"`
	Truncated bool   `json:"truncated,omitempty"`
	Tail      string `json:"tail,omitempty"`
	// ExitCode is that of the step's command, if it had one that ended.
	ExitCode   *int32     `json:"exit_code,omitempty"`
	Error      string     `json:"error,omitempty"`
	StartedAt  *time.Time `json:"started_at,omitempty"`
	DurationMS int64      `json:"duration_ms,omitempty"`
}

// output collects what a step prints. It is safe for concurrent use.
type output struct {
	most  int // bytes of head
	mu    sync.Mutex
	head  []byte
	tail  []byte
	cut   bool
	exit  *int32        // exit code of the last command
	skip  bool          // the step had nothing to do
	fresh chan struct{} // signals new output
}

// newOutput returns an empty output that is limited to what the build's other steps have
// left of maxLog.
func newOutput(steps []Step) *output {
	left := maxLog
	for _, s := range steps {
		left -= len(s.Output)
	}
	return &output{most: max(0, min(maxOutput, left)), fresh: make(chan struct{}, 1)}
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	n := min(len(p), o.most-len(o.head))
	o.head = append(o.head, p[:n]...)
	if n < len(p) {
		o.cut = true
		o.tail = append(o.tail, p[n:]...)
		if len(o.tail) > 2*maxTail {
			o.tail = append(o.tail[:0], o.tail[len(o.tail)-maxTail:]...)
		}
	}
	o.mu.Unlock()
	select {
	case o.fresh <- struct{}{}:
	default:
	}
	return len(p), nil
}

// exited records a command's exit code.
func (o *output) exited(code int32) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.exit = &code
}

// skipped records that the step had nothing to do.
func (o *output) skipped() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.skip = true
}

// fill copies the output so far into a step.
func (o *output) fill(s *Step) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s.ExitCode = o.exit
	if o.skip {
		s.State = stepSkipped
	}
	s.Output, s.Truncated = text(whole(o.head)), o.cut
	if len(s.Output) > o.most { // U+FFFD is longer than the byte it replaces.
		s.Output, s.Truncated = string(whole([]byte(s.Output[:o.most]))), true
	}
	if o.cut {
		tail := text(o.tail[max(0, len(o.tail)-maxTail):])
		s.Tail = strings.ToValidUTF8(tail[max(0, len(tail)-maxTail):], "")
	}
}

// whole cuts off an incomplete UTF-8 character at the end, so that later updates only
// append.
func whole(b []byte) []byte {
	for n := 1; n < utf8.UTFMax && n <= len(b); n++ {
		if c := b[len(b)-n]; utf8.RuneStart(c) {
			if !utf8.FullRune(b[len(b)-n:]) {
				return b[:len(b)-n]
			}
			break
		}
	}
	return b
}

// text replaces what JSONB cannot hold.
func text(b []byte) string {
	return strings.ReplaceAll(strings.ToValidUTF8(string(b), "\uFFFD"), "\x00", "\uFFFD")
}
