// Package client is the Go client of Wrenn's API.
//
//	c, err := client.New("http://localhost:8000", os.Getenv("WRENN_API_KEY"))
//	s, err := c.Create(ctx, client.CreateOptions{})
//	defer c.Delete(ctx, s.ID)
//	r, err := c.Exec(ctx, s.ID, client.Command{Cmd: "python3", Args: []string{"-c", "print(6*7)"}}, nil)
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn-dev/wrenn/internal/backoff"
)

// Client calls one Wrenn service. It is safe for concurrent use.
type Client struct {
	base    *url.URL
	key     string
	access  string // a session's access token, instead of the key
	team    string // for which the session acts
	http    *http.Client
	retries int
	agent   string
}

// Option configures a client.
type Option func(*Client)

// WithHTTPClient makes the client send its requests with a copy of h that follows no
// redirects. If h has a Timeout, that also limits transfers of files.
func WithHTTPClient(h *http.Client) Option { return func(c *Client) { c.http = h } }

// WithRetries sets how often the client retries a call (6, over about 10 seconds). It
// retries calls that are safe to repeat if the service does not answer or is
// unavailable, and any call, except an upload, that never got a connection.
func WithRetries(n int) Option { return func(c *Client) { c.retries = n } }

// WithUserAgent sets the User-Agent of every request.
func WithUserAgent(s string) Option { return func(c *Client) { c.agent = s } }

// New returns a client of the service at baseURL, for example "http://localhost:8000".
// It authenticates with the API key key.
func New(baseURL, key string, opts ...Option) (*Client, error) {
	u, err := url.Parse(baseURL)
	if err != nil {
		return nil, fmt.Errorf("service's URL: %w", err)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("service's URL %q: want http://host or https://host", baseURL)
	}
	u.Path = strings.TrimSuffix(u.Path, "/")
	u.RawQuery, u.Fragment = "", ""
	c := &Client{base: u, key: key, retries: 6, agent: "wrenn-go"}
	for _, o := range opts {
		o(c)
	}
	if c.http == nil {
		// The default transport asks for compression, which hides the lengths of files.
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.DisableCompression = true
		t.MaxIdleConnsPerHost = 64
		c.http = &http.Client{Transport: t}
	}
	// A redirect must not take a key or a password to another service.
	h := *c.http
	h.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	c.http = &h
	return c, nil
}

// Error is an error response of the service.
type Error struct {
	Status    int    // HTTP status
	Code      string // for example "not_found"
	Message   string // for people
	RequestID string // to find the call in the service's log
}

func (e *Error) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("the service answered %d %s", e.Status, http.StatusText(e.Status))
	}
	return e.Message
}

// IsNotFound reports whether err is the service's answer that something does not exist.
func IsNotFound(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusNotFound
}

// request is one call.
type request struct {
	method, path string // path is escaped
	query        url.Values
	header       http.Header
	json         any       // body, as JSON; or
	body         io.Reader // body that can be read only once, so there are no retries
	repeatable   bool
}

// do sends a request, with retries, and returns a successful response, whose body the
// caller closes. Any other response is an [Error].
func (c *Client) do(ctx context.Context, r request) (*http.Response, error) {
	var encoded []byte
	if r.json != nil {
		var err error
		if encoded, err = json.Marshal(r.json); err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
	}
	// The jitter spreads the clients of a service that is available again.
	waits := backoff.New(150*time.Millisecond, 5*time.Second)
	for try := 0; ; try++ {
		resp, err := c.once(ctx, r, encoded)
		if err == nil {
			return resp, nil
		}
		if r.body != nil || try >= c.retries || !unsent(err) && !(r.repeatable && transient(err)) {
			return nil, err
		}
		if waits.Wait(ctx) != nil {
			return nil, errors.Join(err, ctx.Err())
		}
	}
}

// unsent reports whether a call failed because it got no connection.
func unsent(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}

// transient reports whether a call that failed with err may succeed later.
func transient(err error) bool {
	var e *Error
	if errors.As(err, &e) {
		return e.Status == http.StatusBadGateway || e.Status == http.StatusServiceUnavailable || e.Status == http.StatusGatewayTimeout
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	var op net.Error
	return errors.As(err, &op) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

func (c *Client) once(ctx context.Context, r request, encoded []byte) (*http.Response, error) {
	u := *c.base
	plain, err := url.PathUnescape(r.path)
	if err != nil {
		return nil, err
	}
	u.Path, u.RawPath = u.Path+plain, u.EscapedPath()+r.path
	u.RawQuery = r.query.Encode()
	body := r.body
	if r.json != nil {
		body = bytes.NewReader(encoded)
	}
	req, err := http.NewRequestWithContext(ctx, r.method, u.String(), body)
	if err != nil {
		return nil, err
	}
	for k, v := range r.header {
		req.Header[k] = v
	}
	c.identify(req.Header)
	req.Header.Set("User-Agent", c.agent)
	switch {
	case r.json != nil:
		req.Header.Set("Content-Type", "application/json")
	case r.body != nil && req.Header.Get("Content-Type") == "":
		req.Header.Set("Content-Type", "application/octet-stream")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= 300 {
		defer resp.Body.Close()
		return nil, readError(resp)
	}
	return resp, nil
}

// identify adds the client's credentials to a request's header.
func (c *Client) identify(h http.Header) {
	switch {
	case c.access != "":
		h.Set("Authorization", "Bearer "+c.access)
		if c.team != "" {
			h.Set("X-Team", c.team)
		}
	case c.key != "":
		h.Set("X-API-Key", c.key)
	}
}

// readError turns an error response into an Error.
func readError(resp *http.Response) *Error {
	e := &Error{Status: resp.StatusCode, RequestID: resp.Header.Get("X-Request-Id")}
	var body struct {
		Error struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"error"`
	}
	// The body can also be some other proxy's page: then only the status counts.
	if json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&body) == nil {
		e.Code, e.Message = body.Error.Code, body.Error.Message
	}
	if to := resp.Header.Get("Location"); e.Message == "" && to != "" {
		e.Message = fmt.Sprintf("the service answered %d, a redirect to %q: if you trust that URL, use it as the service's", e.Status, to)
	}
	return e
}

// call sends a request and decodes the response into result, unless that is nil.
func (c *Client) call(ctx context.Context, r request, result any) error {
	resp, err := c.do(ctx, r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if result == nil {
		_, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<20)) // to reuse the connection
		return err
	}
	if err := json.NewDecoder(resp.Body).Decode(result); err != nil {
		return fmt.Errorf("read response: %w", err)
	}
	return nil
}

func sandboxPath(id, rest string) string { return "/v1/sandboxes/" + url.PathEscape(id) + rest }

// URL returns the URL of a sandbox's port. If its host name is below the service's, the
// URL has the scheme and port of the client's base URL.
func (c *Client) URL(s *Sandbox, port int) string {
	own := strings.Replace(s.URL, "{port}", strconv.Itoa(port), 1)
	u, err := url.Parse(own)
	if err != nil {
		return own
	}
	service := c.base.Hostname()
	if net.ParseIP(service) != nil {
		service = "localhost" // there are no host names below an IP address
	}
	if _, domain, _ := strings.Cut(u.Hostname(), "."); strings.EqualFold(domain, service) {
		u.Scheme, u.Host = c.base.Scheme, u.Hostname()
		if p := c.base.Port(); p != "" {
			u.Host += ":" + p
		}
	}
	u.Path = "/"
	return u.String()
}

// Transport returns a transport for requests to URLs that [Client.URL] returns. It
// connects to the service without resolving their host names. It sends the API key,
// except to other hosts that a guest redirects to.
func (c *Client) Transport() http.RoundTripper {
	port := c.base.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[c.base.Scheme]
	}
	target := net.JoinHostPort(c.base.Hostname(), port)
	var d net.Dialer
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.Proxy = nil
	t.DisableCompression = true
	t.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return d.DialContext(ctx, network, target)
	}
	return keyed{c.key, t}
}

// keyed adds the API key to requests.
type keyed struct {
	key  string
	next http.RoundTripper
}

func (k keyed) RoundTrip(r *http.Request) (*http.Response, error) {
	first := r
	for first.Response != nil && first.Response.Request != nil {
		first = first.Response.Request
	}
	// Otherwise a guest could redirect its clients to the API, with their key.
	if r.URL.Scheme != first.URL.Scheme || r.URL.Host != first.URL.Host {
		return k.next.RoundTrip(r)
	}
	r = r.Clone(r.Context())
	r.Header.Set("X-API-Key", k.key)
	return k.next.RoundTrip(r)
}
