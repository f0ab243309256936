// Package patience bounds how long a listener waits for clients: for the bodies of their
// requests, and until they read an answer. A body gets little time until the request's
// handler says that it may take longer.
package patience

import (
	"context"
	"io"
	"net/http"
	"sync"
	"time"
)

// Limits say how long bodies and answers may take.
type Limits struct {
	// Whole is for all of a body, from its first byte to its last.
	Whole time.Duration
	// Grace, Rate and Longest are for streams: a body may keep its reader waiting
	// for Grace in all, and for a second more for every Rate bytes of it, but
	// never for more than Longest. Whatever a stream fills is free after that.
	Grace   time.Duration
	Rate    int64
	Longest time.Duration
	// Idle is for bodies that rest in between, such as a terminal's input: it is
	// how long nothing may come.
	Idle time.Duration
	// Unread is how long a client may leave a piece of an answer unread.
	Unread time.Duration
}

// Default are the limits of every listener.
var Default = Limits{Whole: time.Minute, Grace: 30 * time.Second, Rate: 16 << 10, Longest: 6 * time.Hour, Idle: time.Hour, Unread: 10 * time.Minute}

// resolution is how exact a deadline is: setting it costs HTTP/2 a message.
const resolution = 8

type mode int

const (
	whole mode = iota
	stream
	idle
	trusted
)

type bodyKey struct{}

// Handler returns next with a deadline for every body. A read after it fails
// with [os.ErrDeadlineExceeded], and the connection ends with the response.
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

// Stream lets a request's body take as long as it needs at the least rate.
func Stream(r *http.Request) { change(r, stream) }

// Idle lets a request's body rest for as long as [Limits] say each time.
func Idle(r *http.Request) { change(r, idle) }

// Trust lets a request's body take as long as it likes: who sends it is known to
// be one of us.
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

// body is a request's, with a deadline for each read.
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
	case whole, trusted: // What is read does not move their deadline.
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
		// The server goes on reading, to notice that the client leaves.
		b.set(time.Time{}, 0)
	}
	return n, err
}

// set moves the deadline, unless the one that is set is near enough. b.mu is
// held, or nobody else has b.
func (b *body) set(to time.Time, near time.Duration) {
	if !to.IsZero() && !b.until.IsZero() && to.Sub(b.until).Abs() < near {
		return
	}
	b.until = to
	// Without it, as of a test's recorder, nothing waits for a network.
	_ = b.control.SetReadDeadline(to)
}
