package upstream

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"
)

// reply is the [http.ResponseWriter] that a [Server] gives to its handler. It writes one
// HTTP/1.1 response to the connection's buffer, and is not for concurrent use.
type reply struct {
	c      *served
	r      *http.Request
	header http.Header

	begun   bool // the final header is written
	status  int
	length  int64 // Content-Length; -1: the body is chunked
	written int64 // bytes of the body that the handler wrote
	closes  bool  // the connection closes after the response
	err     error // the first error of writing
}

// Header implements [http.ResponseWriter].
func (w *reply) Header() http.Header { return w.header }

// WriteHeader implements [http.ResponseWriter].
func (w *reply) WriteHeader(status int) {
	switch {
	case w.begun:
		return
	case status < 100 || status > 999 || status == http.StatusSwitchingProtocols:
		panic(fmt.Sprintf("invalid status %d", status))
	case status < 200:
		w.line(status)
		_ = w.header.WriteSubset(w.c.bw, framing)
		w.text("\r\n")
		w.check(w.c.bw.Flush())
		return
	}
	w.begun, w.status = true, status
	w.line(status)
	lengths := w.header["Content-Length"]
	if len(lengths) > 0 {
		if n, err := strconv.ParseUint(lengths[0], 10, 63); err == nil {
			w.length = int64(n)
		}
	}
	_ = w.header.WriteSubset(w.c.bw, w.excluded())
	if _, ok := w.header["Date"]; !ok {
		w.text("Date: ")
		w.text(time.Now().UTC().Format(http.TimeFormat))
		w.text("\r\n")
	}
	switch {
	case w.length >= 0:
		w.text("Content-Length: ")
		w.text(strconv.FormatInt(w.length, 10))
		w.text("\r\n")
	case w.hasBody():
		w.text("Transfer-Encoding: chunked\r\n")
	}
	if w.closes = hasToken(w.header["Connection"], "close") || w.c.l.isClosing(); w.closes {
		w.text("Connection: close\r\n")
	}
	w.text("\r\n")
}

// framing has the fields that the server writes itself, whatever the handler set.
var framing = map[string]bool{"Content-Length": true, "Transfer-Encoding": true, "Connection": true}

// excluded returns the fields that WriteHeader does not copy to the header: framing,
// and the trailers with [http.TrailerPrefix].
func (w *reply) excluded() map[string]bool {
	names := framing
	for name := range w.header {
		if !strings.HasPrefix(name, http.TrailerPrefix) {
			continue
		}
		if len(names) == len(framing) {
			names = maps.Clone(framing)
		}
		names[name] = true
	}
	return names
}

// hasBody reports whether a body follows the header.
func (w *reply) hasBody() bool { return !bodiless(w.status) && w.r.Method != http.MethodHead }

// line writes the status line.
func (w *reply) line(status int) {
	w.text("HTTP/1.1 ")
	w.text(strconv.Itoa(status))
	w.text(" ")
	w.text(http.StatusText(status))
	w.text("\r\n")
}

func (w *reply) text(s string) {
	_, err := w.c.bw.WriteString(s)
	w.check(err)
}

// check keeps the first error.
func (w *reply) check(err error) {
	if err != nil && w.err == nil {
		w.err = err
	}
}

// Write implements [http.ResponseWriter].
func (w *reply) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	switch {
	case w.err != nil:
		return 0, w.err
	case bodiless(w.status):
		return 0, http.ErrBodyNotAllowed
	}
	w.written += int64(len(p))
	switch {
	case w.length >= 0 && w.written > w.length:
		return 0, http.ErrContentLength
	case !w.hasBody() || len(p) == 0:
		return len(p), nil
	}
	if w.length < 0 {
		w.text(strconv.FormatInt(int64(len(p)), 16))
		w.text("\r\n")
	}
	n, err := w.c.bw.Write(p)
	w.check(err)
	if w.length < 0 {
		w.text("\r\n")
	}
	return n, w.err
}

// SetWriteDeadline is called by [http.ResponseController]. Until the response ends, t
// replaces the deadline that the server sets for a client that reads nothing.
func (w *reply) SetWriteDeadline(t time.Time) error {
	w.c.sendOwn, w.c.sendUntil = true, time.Time{}
	return w.c.Conn.SetWriteDeadline(t)
}

// FlushError is called by [http.ResponseController].
func (w *reply) FlushError() error {
	w.WriteHeader(http.StatusOK)
	w.check(w.c.bw.Flush())
	return w.err
}

// Flush implements [http.Flusher].
func (w *reply) Flush() { _ = w.FlushError() }

var errShort = errors.New("the response is shorter than its header says")

// finish completes the response: it writes the header if the handler did not, the end of
// a chunked body and the trailers. It reports whether the connection can be used again.
func (w *reply) finish() bool {
	if !w.begun && w.header["Content-Length"] == nil && w.r.Method != http.MethodHead {
		w.header["Content-Length"] = []string{"0"}
	}
	w.WriteHeader(http.StatusOK)
	switch {
	case !w.hasBody():
	case w.length >= 0:
		if w.written != w.length {
			w.check(errShort)
		}
	default:
		w.text("0\r\n")
		_ = w.trailer().Write(w.c.bw)
		w.text("\r\n")
	}
	w.check(w.c.bw.Flush())
	return w.err == nil && !w.closes
}

// trailer returns the fields that follow a chunked body: those that Trailer announced
// and those with [http.TrailerPrefix].
func (w *reply) trailer() http.Header {
	t := make(http.Header)
	for _, list := range w.header["Trailer"] {
		for name := range strings.SplitSeq(list, ",") {
			name = http.CanonicalHeaderKey(strings.TrimSpace(name))
			if values := w.header[name]; values != nil && httpguts.ValidTrailerHeader(name) {
				t[name] = values
			}
		}
	}
	for name, values := range w.header {
		if name, ok := strings.CutPrefix(name, http.TrailerPrefix); ok && httpguts.ValidTrailerHeader(name) {
			t[name] = values
		}
	}
	return t
}
