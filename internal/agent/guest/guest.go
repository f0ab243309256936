package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/requestid"
	"github.com/wrenn-dev/wrenn/internal/text"
	"github.com/wrenn-dev/wrenn/internal/tracing"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

const (
	// maxReply bounds one message of the guest, which the agent buffers while its caller
	// does not read. Root in the guest can replace the daemon, whose own messages have at
	// most 32 KiB of output.
	maxReply = 64 << 10
	maxError = 2 << 10
)

// Client talks to the daemon of one guest. Its errors are Connect errors.
type Client struct {
	base      string
	token     atomic.Pointer[string]
	http      *http.Client
	transport *upstream.Transport
	processes processconnect.ProcessClient

	// suspects has a value if the guest may be silent; see Suspected.
	suspects chan struct{}

	life context.Context // ends with the client
	end  context.CancelFunc
}

// New makes a client for the guest at addr. token is the guest's present access token. A
// restored guest has that of its template's capture, or none, until [Client.Init].
func New(addr netip.Addr, token string) *Client {
	target := netip.AddrPortFrom(addr, hostwire.GuestPort).String()
	// HTTP/1.1 with a connection per request: over HTTP/2, all requests share a flow
	// control window, so a process that does not read its input would stop all of them.
	t := &upstream.Transport{
		Dial: func(ctx context.Context, _ string) (net.Conn, error) {
			return dial(ctx, target) // never elsewhere, whatever the guest responds
		},
		IdleTimeout: 60 * time.Second,
		MaxIdle:     8, MaxIdlePerHost: 8,
		MaxHeaderBytes: 64 << 10,
	}
	life, end := context.WithCancel(context.Background())
	c := &Client{
		life: life, end: end, suspects: make(chan struct{}, 1),
		base: "http://" + target, transport: t,
	}
	c.http = &http.Client{
		Transport:     requestid.Transport{Next: tracing.GuestTransport{Next: suspicious{t, c.Suspect}}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	c.token.Store(&token)
	c.processes = processconnect.NewProcessClient(authorized{c}, c.base, connect.WithReadMaxBytes(maxReply))
	return c
}

// authorized adds the access token to requests of the Connect client.
type authorized struct{ c *Client }

func (a authorized) Do(r *http.Request) (*http.Response, error) {
	r.Header.Set(hostwire.AccessToken, *a.c.token.Load())
	return a.c.http.Do(r)
}

// suspicious calls suspect for each request that fails or gets no response within slow.
type suspicious struct {
	next    http.RoundTripper
	suspect func()
}

// slow is the time without a response after which a request calls suspect. It is only a
// hint, because some commands send no response until they end.
const slow = 5 * time.Second

func (w suspicious) RoundTrip(r *http.Request) (*http.Response, error) {
	defer time.AfterFunc(slow, w.suspect).Stop()
	resp, err := w.next.RoundTrip(r)
	if err != nil {
		w.suspect()
	}
	return resp, err
}

// Suspect notes that the guest may be silent.
func (c *Client) Suspect() {
	select {
	case c.suspects <- struct{}{}:
	default:
	}
}

// Suspected returns a channel that receives a value after requests of this client failed
// or got no response for a while.
func (c *Client) Suspected() <-chan struct{} { return c.suspects }

// Answers reports whether the guest daemon responds within the time.
func (c *Client) Answers(ctx context.Context, within time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	return c.healthy(ctx)
}

// Close closes idle connections. Requests in flight continue until their contexts end.
func (c *Client) Close() {
	c.end()
	c.transport.Close()
}

// The backoff between attempts to reach a booting guest.
const (
	firstPause = 20 * time.Millisecond
	lastPause  = 250 * time.Millisecond
	oneAttempt = 5 * time.Second
)

// Wait waits until the daemon is healthy. It returns ctx's error if ctx ends first.
func (c *Client) Wait(ctx context.Context) error {
	attempts := backoff.New(firstPause, lastPause)
	for !c.Answers(ctx, oneAttempt) {
		if err := attempts.Wait(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (c *Client) healthy(ctx context.Context) bool {
	resp, err := c.do(ctx, http.MethodGet, "/health", nil, nil, -1)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return true
}

// Metrics are a guest's own measurements.
type Metrics struct {
	Time        time.Time
	CPUs        int
	CPUUsedPct  float64 // 0 to 100, all processors together
	MemoryTotal int64   // bytes, like the fields below
	MemoryUsed  int64
	DiskTotal   int64
	DiskUsed    int64
}

// Metrics asks the guest for its metrics.
func (c *Client) Metrics(ctx context.Context) (Metrics, error) {
	resp, err := c.do(ctx, http.MethodGet, "/metrics", nil, nil, -1)
	if err != nil {
		return Metrics{}, err
	}
	defer resp.Body.Close()
	var m struct {
		TS         int64   `json:"ts"`
		CPUCount   int     `json:"cpu_count"`
		CPUUsedPct float64 `json:"cpu_used_pct"`
		MemTotal   int64   `json:"mem_total"`
		MemUsed    int64   `json:"mem_used"`
		DiskUsed   int64   `json:"disk_used"`
		DiskTotal  int64   `json:"disk_total"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&m); err != nil {
		return Metrics{}, unreadable(ctx, err)
	}
	return Metrics{time.Unix(m.TS, 0), m.CPUCount, m.CPUUsedPct, m.MemTotal, m.MemUsed, m.DiskTotal, m.DiskUsed}, nil
}

// FileInfo describes a written file.
type FileInfo struct {
	Path string
	Name string
	Size int64
}

func fileQuery(user, path string) url.Values {
	q := url.Values{"path": {path}}
	if user != "" {
		q.Set("username", user)
	}
	return q
}

// Write writes a file as user (empty: the guest's default). size is the content's length
// in bytes, or -1 if unknown. After an error, the file is unchanged.
func (c *Client) Write(ctx context.Context, user, path string, content io.Reader, size int64) (FileInfo, error) {
	counted := &counter{r: content}
	resp, err := c.do(ctx, http.MethodPost, "/files", fileQuery(user, path), counted, size)
	if err != nil {
		return FileInfo{}, err
	}
	defer resp.Body.Close()
	var files []struct {
		Path string `json:"path"`
		Name string `json:"name"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&files); err != nil || len(files) != 1 {
		return FileInfo{}, unreadable(ctx, err)
	}
	return FileInfo{text.Clean(files[0].Path, maxError), text.Clean(files[0].Name, maxError), counted.n}, nil
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// Unpack unpacks a tar archive into the directory path, which the guest makes. If owner is
// not empty, it owns all files, which get exactly the archive's modes; otherwise user does.
func (c *Client) Unpack(ctx context.Context, user, path, owner string, archive io.Reader) error {
	q := fileQuery(user, path)
	if owner != "" {
		q.Set("owner", owner)
	}
	resp, err := c.do(ctx, http.MethodPost, "/archive", q, archive, -1)
	if err != nil {
		return err
	}
	resp.Body.Close()
	return nil
}

// Read opens length bytes of a file from offset on. A length of 0 means up to the end.
// size is the size of the whole file in bytes, or -1 if the guest does not know it.
func (c *Client) Read(ctx context.Context, user, path string, offset, length int64) (content io.ReadCloser, size int64, err error) {
	ranged := offset > 0 || length > 0
	resp, err := c.send(ctx, http.MethodGet, "/files", fileQuery(user, path), nil, -1, func(h http.Header) {
		if !ranged {
			return
		}
		last := ""
		if length > 0 {
			last = strconv.FormatInt(offset+length-1, 10)
		}
		h.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-"+last)
	})
	if err != nil {
		return nil, 0, err
	}
	switch {
	case resp.StatusCode == http.StatusPartialContent:
		_, total, ok := strings.Cut(resp.Header.Get("Content-Range"), "/")
		size, err = strconv.ParseInt(total, 10, 64)
		if !ok || err != nil || size < 0 {
			resp.Body.Close()
			return nil, 0, unreadable(ctx, errors.New("its response has no size"))
		}
		return c.body(ctx, resp), size, nil
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		// An offset at the end is valid here, but not in HTTP.
		_, total, _ := strings.Cut(resp.Header.Get("Content-Range"), "/")
		resp.Body.Close()
		if n, err := strconv.ParseInt(total, 10, 64); err == nil && offset <= n && n >= 0 {
			return io.NopCloser(strings.NewReader("")), n, nil
		}
		return nil, 0, connect.NewError(connect.CodeOutOfRange, clienterr.New("the offset is past the end of the file"))
	case ranged:
		// The guest sends a file of unknown size, such as one in /proc, from its beginning.
		return c.skip(ctx, resp, offset, length)
	}
	return c.body(ctx, resp), resp.ContentLength, nil
}

func (c *Client) skip(ctx context.Context, resp *http.Response, offset, length int64) (io.ReadCloser, int64, error) {
	body := c.body(ctx, resp)
	if _, err := io.CopyN(io.Discard, body, offset); err != nil {
		body.Close()
		if errors.Is(err, io.EOF) {
			err = connect.NewError(connect.CodeOutOfRange, clienterr.New("the offset is past the end of the file"))
		}
		return nil, 0, err
	}
	var r io.Reader = body
	if length > 0 {
		r = io.LimitReader(body, length)
	}
	return struct {
		io.Reader
		io.Closer
	}{r, body}, resp.ContentLength, nil
}

// Pack opens a tar archive of the file or directory at path.
func (c *Client) Pack(ctx context.Context, user, path string) (io.ReadCloser, error) {
	resp, err := c.do(ctx, http.MethodGet, "/archive", fileQuery(user, path), nil, -1)
	if err != nil {
		return nil, err
	}
	return c.body(ctx, resp), nil
}

// body returns the response's body, with errors of this package.
func (c *Client) body(ctx context.Context, resp *http.Response) io.ReadCloser {
	return &reader{ctx, resp.Body}
}

type reader struct {
	ctx context.Context
	io.ReadCloser
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = lost(r.ctx, err)
	}
	return n, err
}

// do is send for requests that succeed with 200 or 204 only.
func (c *Client) do(ctx context.Context, method, path string, q url.Values, body io.Reader, size int64) (*http.Response, error) {
	resp, err := c.send(ctx, method, path, q, body, size, nil)
	if err == nil && resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNoContent {
		resp.Body.Close()
		return nil, unreadable(ctx, fmt.Errorf("status %d", resp.StatusCode))
	}
	return resp, err
}

func (c *Client) send(ctx context.Context, method, path string, q url.Values, body io.Reader, size int64, header func(http.Header)) (*http.Response, error) {
	u := c.base + path
	if q != nil {
		u += "?" + q.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, body)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("make request to the guest: %w", err))
	}
	if body != nil {
		if req.ContentLength = size; size == 0 {
			req.Body = http.NoBody
		}
		req.Header.Set("Content-Type", "application/octet-stream")
	}
	req.Header.Set(hostwire.AccessToken, *c.token.Load())
	if header != nil {
		header(req.Header)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, lost(ctx, err)
	}
	if resp.StatusCode >= 400 && resp.StatusCode != http.StatusRequestedRangeNotSatisfiable {
		defer resp.Body.Close()
		return nil, refusal(resp)
	}
	return resp, nil
}

// refusal converts the guest's error response to an error.
func refusal(resp *http.Response) error {
	var said struct{ Code, Message string }
	code, message := codeOf(resp.StatusCode), "status "+strconv.Itoa(resp.StatusCode)
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if media == "application/json" && json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&said) == nil {
		var c connect.Code
		if c.UnmarshalText([]byte(said.Code)) == nil && c >= connect.CodeCanceled && c <= connect.CodeUnauthenticated {
			code = c
		}
		message = said.Message
	}
	return own(code, message)
}

func codeOf(status int) connect.Code {
	switch status {
	case http.StatusBadRequest:
		return connect.CodeInvalidArgument
	case http.StatusNotFound:
		return connect.CodeNotFound
	case http.StatusUnauthorized:
		return connect.CodeUnauthenticated
	case http.StatusForbidden:
		return connect.CodePermissionDenied
	case http.StatusConflict:
		return connect.CodeFailedPrecondition
	case http.StatusInsufficientStorage, http.StatusTooManyRequests:
		return connect.CodeResourceExhausted
	case http.StatusServiceUnavailable:
		return connect.CodeUnavailable
	}
	return connect.CodeInternal
}

// SourceHeader marks an error of the guest, as opposed to one of the agent, with the value
// [SourceGuest] in its metadata.
const (
	SourceHeader = "Wrenn-Error-Source"
	SourceGuest  = "guest"
)

// Said reports whether err is an error response of the guest.
func Said(err error) bool {
	var ce *connect.Error
	return errors.As(err, &ce) && ce.Meta().Get(SourceHeader) == SourceGuest
}

// own makes an error with the guest's code and message.
func own(code connect.Code, message string) *connect.Error {
	if code == connect.CodeUnauthenticated {
		// The agent's token is right, so it is the user who is unknown.
		code = connect.CodeInvalidArgument
	}
	err := connect.NewError(code, clienterr.New("%s", text.Clean(message, maxError)))
	err.Meta().Set(SourceHeader, SourceGuest)
	return err
}

// lost makes the error of a request without a complete response. If ctx ended, its cause
// is the error.
func lost(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		var ce *connect.Error
		switch {
		case errors.As(cause, &ce):
			return ce
		case errors.Is(cause, context.DeadlineExceeded):
			return connect.NewError(connect.CodeDeadlineExceeded, clienterr.New("the sandbox did not respond in time"))
		case errors.Is(cause, context.Canceled):
			return connect.NewError(connect.CodeCanceled, clienterr.New("the request was cancelled"))
		}
		return connect.NewError(connect.CodeUnavailable, cause)
	}
	var ce *connect.Error
	if errors.As(err, &ce) {
		return ce
	}
	return connect.NewError(connect.CodeUnavailable, clienterr.Because(reason(err), "the sandbox did not respond"))
}

// unreadable makes the error of a response that the daemon should never send.
func unreadable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return lost(ctx, err)
	}
	return connect.NewError(connect.CodeUnavailable, clienterr.Because(err, "the sandbox's daemon sent an invalid response"))
}

// fromConnect converts an error of the Connect client to one of this package.
func fromConnect(ctx context.Context, err error) error {
	var ce *connect.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &ce) && connect.IsWireError(err):
		said := own(ce.Code(), ce.Message())
		switch reason := ce.Meta().Get(hostwire.ErrorReason); reason {
		case hostwire.CommandNotFound, hostwire.CommandNotExecutable:
			said.Meta().Set(hostwire.ErrorReason, reason)
		}
		return said
	case ctx.Err() != nil:
		return lost(ctx, err)
	case ce != nil && ce.Code() == connect.CodeUnauthenticated:
		return own(ce.Code(), "the sandbox has no such user") // a bare status 401
	}
	return connect.NewError(connect.CodeUnavailable, clienterr.Because(reason(err), "the sandbox did not respond"))
}

// reason removes the URL from a request's error, because the guest's address on its host
// must stay private.
func reason(err error) error {
	if at := (*url.Error)(nil); errors.As(err, &at) {
		return at.Err
	}
	return err
}
