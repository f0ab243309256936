// Package duplex lets a proxy answer a request whose body is still under way,
// over HTTP/1.1 as over HTTP/2.
//
// Go's HTTP/1.1 server is half-duplex by default: when the response begins, it
// reads the rest of the request's body itself, and takes it away from a proxy
// that is about to send it on. Full-duplex, it panics at the next request if a
// handler left a part of the body unread (golang/go#68560).
package duplex

import (
	"io"
	"net/http"
	"sync/atomic"
	"time"
)

// linger is how long a client may send on after a response that did not wait
// for all of its request.
var linger = 30 * time.Second

// Serve has h answer a request in full duplex. If the request's body has not
// ended when the response begins, the connection is closed after the response.
func Serve(w http.ResponseWriter, r *http.Request, h func(http.ResponseWriter, *http.Request)) {
	// A server that wraps this one, as Caddy does, may have wrapped the body that
	// is none.
	if r.ProtoMajor != 1 || r.Body == nil || r.ContentLength == 0 {
		h(w, r)
		return
	}
	_ = http.NewResponseController(w).EnableFullDuplex() // Never fails for HTTP/1.1.
	b := &body{ReadCloser: r.Body}
	r.Body = b
	out := &writer{ResponseWriter: w, body: b}
	returned := false
	defer func() {
		if !returned && !b.ended.Load() {
			// h broke the response off. The server would wait for the rest before
			// it closes the connection, and the client would not notice.
			_ = http.NewResponseController(w).SetReadDeadline(time.Unix(1, 0))
		}
	}()
	h(out, r)
	returned = true
	out.begin(http.StatusOK)
	if out.closes {
		// The server waits for the rest before it closes, so that the client gets
		// the response.
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(linger))
	}
}

// body knows whether it was read to its end. Its reader may outlive the handler.
type body struct {
	io.ReadCloser
	ended, closed atomic.Bool
}

// Close leaves the rest to the server. The server's own Close waits for it, and
// a proxy that cannot send a request on closes it before it answers.
func (b *body) Close() error {
	b.closed.Store(true)
	return nil
}

func (b *body) Read(p []byte) (int, error) {
	if b.closed.Load() {
		return 0, http.ErrBodyReadAfterClose
	}
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF {
		b.ended.Store(true)
	}
	return n, err
}

// writer has the connection closed if the body has not ended when the response
// begins: nobody can tell then whether it will be read.
type writer struct {
	http.ResponseWriter
	body          *body
	begun, closes bool
}

func (w *writer) begin(status int) {
	if w.begun || status < 200 && status != http.StatusSwitchingProtocols {
		return
	}
	w.begun = true
	if status >= 200 && !w.body.ended.Load() {
		w.closes = true
		w.Header().Set("Connection", "close")
	}
}

func (w *writer) WriteHeader(status int) {
	w.begin(status)
	w.ResponseWriter.WriteHeader(status)
}

func (w *writer) Write(p []byte) (int, error) {
	w.begin(http.StatusOK)
	return w.ResponseWriter.Write(p)
}

// Flush implements [http.Flusher].
func (w *writer) Flush() { _ = w.FlushError() }

// FlushError is what [http.ResponseController] calls.
func (w *writer) FlushError() error {
	w.begin(http.StatusOK)
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// Unwrap lets [http.ResponseController] reach the rest.
func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }
