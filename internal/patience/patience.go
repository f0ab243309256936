// Package patience limits how long a server waits for clients: for the bodies of their
// requests, and until they read a response. A body has little time unless the request's
// handler allows more.
package patience

import (
	"context"
	"io"
	"net/http"
	"sync"
	"time"
)

// Limits are the time limits for bodies and responses.
type Limits struct {
	// Whole is the time for a whole body, by default.
	Whole time.Duration
	// Grace, Rate and Longest are for streams. The reader may wait for Grace in all, and
	// one second more for every Rate bytes, but never longer than Longest, so that what a
	// stream occupies becomes free again.
	Grace   time.Duration
	Rate    int64
	Longest time.Duration
	// Idle is for bodies with pauses, such as a terminal's input: the time without a byte.
	Idle time.Duration
	// Unread is how long a client may leave a piece of a response unread.
	Unread time.Duration
}

// Default are the limits of every listener.
var Default = Limits{Whole: time.Minute, Grace: 30 * time.Second, Rate: 16 << 10, Longest: 6 * time.Hour, Idle: time.Hour, Unread: 10 * time.Minute}

// resolution is the precision of deadlines, as a fraction of the limit. Each new deadline
// costs HTTP/2 a message.
const resolution = 8

type mode int

const (
	whole mode = iota
	stream
	idle
	trusted
)

type bodyKey struct{}

// Handler returns next with a deadline for every body. A read after the deadline fails
// with [os.ErrDeadlineExceeded], and the server closes the connection after the response.
func Handler(next http.Handler, l Limits) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Body == nil || r.Body == http.NoBody {
			next.ServeHTTP(w, r)
			return
		}
		b := &body{ReadCloser: r.Body, limits: l, control: http.NewResponseController(w)}
		b.set(time.Now().Add(l.Whole), 0)
		r = r.WithContext(context.WithValue(r.Context(), bodyKey{}, b))
		r.Body = b
		next.ServeHTTP(w, r)
	})
}

// Stream allows a request's body the time that its length takes at the minimum rate.
func Stream(r *http.Request) { change(r, stream) }

// Idle allows pauses of [Limits.Idle] in a request's body.
func Idle(r *http.Request) { change(r, idle) }

// Trust removes the deadline of a request's body. Use it for requests from other programs
// of Wrenn.
func Trust(r *http.Request) { change(r, trusted) }

func change(r *http.Request, to mode) {
	b, ok := r.Context().Value(bodyKey{}).(*body)
	if !ok {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mode = to
	if to == trusted {
		b.set(time.Time{}, 0)
	}
}

// body is a request's body with a deadline for each read.
type body struct {
	io.ReadCloser
	limits  Limits
	control *http.ResponseController

	mu     sync.Mutex
	mode   mode
	read   int64         // bytes
	waited time.Duration // of Grace
	until  time.Time     // the deadline that is set; zero: none
	ended  bool
}

func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	switch now := time.Now(); b.mode {
	case stream:
		left := min(b.limits.Grace+time.Duration(b.read/b.limits.Rate)*time.Second, b.limits.Longest) - b.waited
		b.set(now.Add(left), left/resolution)
	case idle:
		b.set(now.Add(b.limits.Idle), b.limits.Idle/resolution)
	case whole, trusted: // reading does not move their deadline
	}
	b.mu.Unlock()
	begun := time.Now()
	n, err := b.ReadCloser.Read(p)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.read += int64(n)
	b.waited += time.Since(begun)
	if err == io.EOF && !b.ended {
		b.ended = true
		// The server keeps reading, to notice when the client leaves.
		b.set(time.Time{}, 0)
	}
	return n, err
}

// set moves the deadline, unless the present one is within near of it. The caller holds
// b.mu, or nobody else has b.
func (b *body) set(to time.Time, near time.Duration) {
	if !to.IsZero() && !b.until.IsZero() && to.Sub(b.until).Abs() < near {
		return
	}
	b.until = to
	// A writer without deadlines, such as a test's recorder, never blocks.
	_ = b.control.SetReadDeadline(to)
}
