package upstream

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/net/http/httpguts"
)

// Proxy is a faster [httputil.ReverseProxy]. Its fields mean the same, with these
// differences: it does not change queries, a response's header fields replace those of
// the [http.ResponseWriter], and it flushes the part of a response that has arrived
// before it waits for more.
type Proxy struct {
	Transport http.RoundTripper
	Rewrite   func(*httputil.ProxyRequest)
	// ModifyResponse may be nil.
	ModifyResponse func(*http.Response)
	// Filter, if not nil, removes the fields that clients must not get from every header
	// and trailer of the upstream, including interim responses (1xx). It does not see
	// the trailers of requests with an Upgrade.
	Filter       func(http.Header)
	ErrorHandler func(http.ResponseWriter, *http.Request, error)
	// ErrorLog logs errors of connections that switch to another protocol.
	ErrorLog *log.Logger
}

// ServeHTTP implements [http.Handler].
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header["Upgrade"] != nil {
		p.upgrade(w, r)
		return
	}
	early := &interim{w: w, filter: p.filter}
	out := r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{Got1xxResponse: early.pass}))
	url := *r.URL
	out.URL, out.Close = &url, false
	out.Header = forwardable(r.Header, 4)
	if hasToken(r.Header["Te"], "trailers") {
		out.Header["Te"] = []string{"trailers"}
	}
	for _, name := range [...]string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		delete(out.Header, name)
	}
	if r.ContentLength == 0 {
		out.Body = nil
	}
	p.Rewrite(&httputil.ProxyRequest{In: r, Out: out})
	if out.Body != nil {
		// The transport may still read the body when the handler returns. Close stops it.
		defer out.Body.Close()
	}
	if _, ok := out.Header["User-Agent"]; !ok {
		out.Header["User-Agent"] = []string{""} // Otherwise net/http adds its own.
	}
	resp, err := strict{p.Transport}.RoundTrip(out)
	early.end()
	if err != nil {
		p.ErrorHandler(w, out, err)
		return
	}
	defer resp.Body.Close()
	p.respond(w, resp)
}

// upgrade forwards a request for another protocol.
func (p *Proxy) upgrade(w http.ResponseWriter, r *http.Request) {
	rp := httputil.ReverseProxy{
		Transport: strict{p.Transport}, Rewrite: p.Rewrite, ErrorHandler: p.ErrorHandler, ErrorLog: p.ErrorLog,
		FlushInterval: -1,
		ModifyResponse: func(resp *http.Response) error {
			p.filter(resp.Header)
			if p.ModifyResponse != nil {
				p.ModifyResponse(resp)
			}
			return nil
		},
	}
	rp.ServeHTTP(filtered{w, p.filter}, r)
}

func (p *Proxy) filter(h http.Header) {
	if p.Filter != nil {
		p.Filter(h)
	}
}

// filtered is a ResponseWriter for an [httputil.ReverseProxy]: it filters interim
// responses, and lets net/http guess no Content-Type.
type filtered struct {
	http.ResponseWriter
	filter func(http.Header)
}

// WriteHeader implements [http.ResponseWriter].
func (f filtered) WriteHeader(status int) {
	switch {
	case status >= 200:
		noGuess(f.Header())
	case status != http.StatusSwitchingProtocols:
		f.filter(f.Header())
	}
	f.ResponseWriter.WriteHeader(status)
}

// Unwrap lets [http.ResponseController] reach the connection.
func (f filtered) Unwrap() http.ResponseWriter { return f.ResponseWriter }

// respond sends the upstream's response to the client.
func (p *Proxy) respond(w http.ResponseWriter, resp *http.Response) {
	resp.Header = forwardable(resp.Header, 3)
	p.filter(resp.Header)
	if p.ModifyResponse != nil {
		p.ModifyResponse(resp)
	}
	h := w.Header()
	for name, values := range resp.Header {
		h[name] = values
	}
	noGuess(h)
	if bodiless(resp.StatusCode) {
		delete(h, "Content-Length") // Go's HTTP/2 client would wait for a body.
	}
	announced := make(map[string]bool, len(resp.Trailer))
	p.filter(resp.Trailer)
	for name := range resp.Trailer {
		if !httpguts.ValidTrailerHeader(name) {
			continue // HTTP/2's ResponseWriter would log it.
		}
		announced[name] = true
		h["Trailer"] = append(h["Trailer"], name)
	}
	w.WriteHeader(resp.StatusCode)
	if err := pass(w, resp); err != nil {
		// Without a header, the client would conclude that nobody served the request.
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	resp.Body.Close()
	p.filter(resp.Trailer)
	if len(resp.Trailer) == 0 {
		return
	}
	// A response with trailers must be chunked.
	_ = http.NewResponseController(w).Flush()
	for name, values := range resp.Trailer {
		if !httpguts.ValidTrailerHeader(name) {
			continue
		}
		if !announced[name] {
			name = http.TrailerPrefix + name
		}
		h[name] = values
	}
}

// noGuess keeps net/http from adding a Content-Type, which it guesses from the body.
func noGuess(h http.Header) {
	if _, ok := h["Content-Type"]; !ok {
		h["Content-Type"] = nil
	}
}

// strict refuses the responses that a [http.ResponseWriter] cannot send: it would panic,
// log each, or change them.
type strict struct{ http.RoundTripper }

func (s strict) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := s.RoundTripper.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if err := check(req, resp); err != nil {
		resp.Body.Close()
		return nil, err
	}
	return resp, nil
}

func check(req *http.Request, resp *http.Response) error {
	switch code := resp.StatusCode; {
	case code == http.StatusSwitchingProtocols:
		if req.Header["Upgrade"] == nil {
			return errSwitched
		}
	case code < 200, code > 999:
		return errStatus(code)
	}
	lengths := resp.Header["Content-Length"]
	if len(lengths) == 0 {
		return nil
	}
	if _, err := strconv.ParseUint(lengths[0], 10, 63); err != nil || len(lengths) > 1 {
		return fmt.Errorf("read response: invalid Content-Length %.100q", lengths)
	}
	return nil
}

var errSwitched = errors.New("read response: the upstream switched protocols without being asked")

func errStatus(code int) error { return fmt.Errorf("read response: invalid status %d", code) }

// bodiless reports whether a final response with the status has no body.
func bodiless(status int) bool {
	return status == http.StatusNoContent || status == http.StatusNotModified
}

// buffers has the buffers for copying bodies.
var buffers = sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}

// pass copies a response's body to the client, and flushes before it waits for more.
func pass(w http.ResponseWriter, resp *http.Response) error {
	// An HTTP/2 guest can send a body with a status that must have none.
	if resp.Body == http.NoBody || bodiless(resp.StatusCode) {
		return nil
	}
	held := buffers.Get().(*[]byte)
	defer buffers.Put(held)
	buf, left := *held, resp.ContentLength
	flush := http.NewResponseController(w)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
			left -= int64(n)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		// A full buffer means that more of a body of known length has already arrived.
		if left != 0 && (resp.ContentLength < 0 || n < len(buf)) {
			if err := flush.Flush(); err != nil {
				return err
			}
		}
	}
}

// perHop has the fields that apply to a single connection.
var perHop = map[string]bool{
	"Connection": true, "Proxy-Connection": true, "Keep-Alive": true, "Proxy-Authenticate": true, "Proxy-Authorization": true,
	"Te": true, "Trailer": true, "Transfer-Encoding": true, "Upgrade": true,
}

// forwardable copies a header without the fields that apply to a single connection, with
// room for more fields. The copy shares the values.
func forwardable(h http.Header, more int) http.Header {
	out := make(http.Header, len(h)+more)
	for name, values := range h {
		if !perHop[name] {
			out[name] = values
		}
	}
	for _, v := range h["Connection"] {
		for name := range strings.SplitSeq(v, ",") {
			delete(out, textproto.CanonicalMIMEHeaderKey(strings.TrimSpace(name)))
		}
	}
	return out
}

// hasToken reports whether lists of tokens contain a token.
func hasToken(list []string, token string) bool {
	return slices.ContainsFunc(list, func(v string) bool {
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(t), token) {
				return true
			}
		}
		return false
	})
}

// interim passes on interim responses (1xx) until the final response arrives.
type interim struct {
	mu     sync.Mutex
	w      http.ResponseWriter
	filter func(http.Header)
	n      int // number of interim responses; HTTP/2's client does not bound it
	over   bool
}

func (i *interim) pass(code int, header textproto.MIMEHeader) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.over {
		return nil
	}
	if code == http.StatusSwitchingProtocols {
		return errSwitched // HTTP/2 has no such response.
	}
	if i.n++; i.n > maxInterim {
		return errInterim
	}
	h := i.w.Header()
	had := h.Clone()
	passed := forwardable(http.Header(header), 0)
	i.filter(passed)
	for name, values := range passed {
		h[name] = values
	}
	i.w.WriteHeader(code)
	clear(h) // WriteHeader keeps the fields after an interim response.
	for name, values := range had {
		h[name] = values
	}
	return nil
}

func (i *interim) end() {
	i.mu.Lock()
	i.over = true
	i.mu.Unlock()
}
