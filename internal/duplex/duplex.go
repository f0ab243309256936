// Package duplex lets a proxy respond while the request's body is still arriving, over
// HTTP/1.1 as well as HTTP/2.
//
// Go's HTTP/1.1 server is half-duplex by default: when the response begins, it reads the
// rest of the request's body itself, so a proxy cannot forward it. In full-duplex mode,
// it panics at the next request if a handler left a part of the body unread
// (golang/go#68560).
package duplex

import (
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// Serve calls h in full-duplex mode. If the request's body has not ended when the
// response begins, the server closes the connection after the response. The listener
// must be one of package linger, or the client may lose the response.
func Serve(w http.ResponseWriter, r *http.Request, h func(http.ResponseWriter, *http.Request)) {
	// The check for http.NoBody is not enough, because Caddy may have wrapped that.
	if r.ProtoMajor != 1 || r.Body == nil || r.ContentLength == 0 {
		h(w, r)
		return
	}
	_ = http.NewResponseController(w).EnableFullDuplex() // never fails for HTTP/1.1
	b := &body{ReadCloser: r.Body}
	r.Body = b
	out := &writer{ResponseWriter: w, body: b}
	// Even if h panics, the server must not wait for the rest of the body before it closes
	// the connection.
	defer b.leave(http.NewResponseController(w))
	h(out, r)
	out.begin(http.StatusOK)
}

// body tracks whether it was read to its end. Its reader may outlive the handler.
type body struct {
	io.ReadCloser
	ended, closed atomic.Bool
	reading       sync.Mutex // held while the server's body is read
}

// Close does nothing. The server's own Close would wait for the rest of the body, and a
// proxy that cannot forward a request closes the body before it responds.
func (b *body) Close() error {
	b.closed.Store(true)
	return nil
}

func (b *body) Read(p []byte) (int, error) {
	b.reading.Lock()
	defer b.reading.Unlock()
	if b.closed.Load() {
		return 0, http.ErrBodyReadAfterClose
	}
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF {
		b.ended.Store(true)
	}
	return n, err
}

// leave stops all reads of an unfinished body. It waits for a read that is under way,
// because the server removes the read deadline afterwards.
func (b *body) leave(control *http.ResponseController) {
	if b.ended.Load() {
		return
	}
	b.closed.Store(true)
	for {
		_ = control.SetReadDeadline(time.Unix(1, 0))
		if b.reading.TryLock() {
			break
		}
		time.Sleep(time.Millisecond) // a read that has just begun may have set its own deadline
	}
	b.reading.Unlock()
}

// writer closes the connection after the response if the body has not ended when the
// response begins, because the body may then never be read.
type writer struct {
	http.ResponseWriter
	body  *body
	begun bool
}

func (w *writer) begin(status int) {
	if w.begun || status < 200 && status != http.StatusSwitchingProtocols {
		return
	}
	w.begun = true
	if status >= 200 && !w.body.ended.Load() {
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

// FlushError implements the method that [http.ResponseController] calls.
func (w *writer) FlushError() error {
	w.begin(http.StatusOK)
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// Unwrap lets [http.ResponseController] reach the other methods.
func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }
