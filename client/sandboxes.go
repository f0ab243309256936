package client

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"
	"unicode/utf8"
)

// Sandbox is one virtual machine. Times that have not come are nil.
type Sandbox struct {
	ID             string            `json:"id"`
	TeamID         string            `json:"team_id"`
	HostID         string            `json:"host_id,omitempty"`
	TemplateID     string            `json:"template_id"`
	Template       string            `json:"template"`
	State          string            `json:"state"`
	VCPUs          int               `json:"vcpus"`
	MemoryMiB      int               `json:"memory_mib"`
	DiskMiB        int               `json:"disk_mib"`
	TimeoutSeconds int               `json:"timeout_seconds"`
	OnTimeout      string            `json:"on_timeout"`
	AutoResume     bool              `json:"auto_resume"`
	Metadata       map[string]string `json:"metadata"`
	CreatedAt      time.Time         `json:"created_at"`
	StartedAt      *time.Time        `json:"started_at,omitempty"`
	ExpiresAt      *time.Time        `json:"expires_at,omitempty"`
	PausedAt       *time.Time        `json:"paused_at,omitempty"`
	ForkedFrom     string            `json:"forked_from,omitempty"`
	EndedAt        *time.Time        `json:"ended_at,omitempty"`
	EndReason      string            `json:"end_reason,omitempty"`
	EndedBecause   string            `json:"ended_because,omitempty"` // in words for people
	Condition      *Condition        `json:"condition,omitempty"`     // what is wrong with it beside its state
	Error          string            `json:"error,omitempty"`
	StartMS        int64             `json:"start_ms,omitempty"`
	AccessToken    string            `json:"access_token"`
	TrafficToken   string            `json:"traffic_token"`
	URL            string            `json:"url"` // with "{port}" in the port's place
}

// Condition is what is wrong with a sandbox beside its state.
type Condition struct {
	// Kind is Unresponsive or MemoryLost.
	Kind    string    `json:"kind"`
	Reason  string    `json:"reason"` // a word, such as "oom"
	Message string    `json:"message"`
	Since   time.Time `json:"since"`
}

// The kinds of conditions.
const (
	// Unresponsive: the sandbox runs, and its guest does not answer.
	Unresponsive = "unresponsive"
	// MemoryLost: the sandbox is paused and has its disk alone, from which it boots when
	// it is resumed, rebooted or used.
	MemoryLost = "memory_lost"
)

// What becomes of a sandbox that was not used for its timeout.
const (
	DestroyOnTimeout = "destroy"
	PauseOnTimeout   = "pause"
)

// CreateOptions say what sandbox to create; zeros stand for the service's
// defaults.
type CreateOptions struct {
	Template  string `json:"template,omitempty"`
	VCPUs     int    `json:"vcpus,omitempty"`
	MemoryMiB int    `json:"memory_mib,omitempty"`
	DiskMiB   int    `json:"disk_mib,omitempty"`
	// TimeoutSeconds without use after which the sandbox is destroyed, or
	// paused; nil is the service's default, 0 is never.
	TimeoutSeconds *int `json:"timeout_seconds,omitempty"`
	// OnTimeout is DestroyOnTimeout or PauseOnTimeout; empty: the former.
	OnTimeout string `json:"on_timeout,omitempty"`
	// AutoResume lets the first request or call that uses a paused sandbox
	// resume it; nil: it does where OnTimeout is PauseOnTimeout.
	AutoResume *bool             `json:"auto_resume,omitempty"`
	Envs       map[string]string `json:"envs,omitempty"`
	Metadata   map[string]string `json:"metadata,omitempty"`
	// HostTags are tags that the sandbox's host must have.
	HostTags []string `json:"host_tags,omitempty"`

	// IdempotencyKey makes a repeated call return the first one's sandbox.
	// Empty: a random one, for the client's own retries.
	IdempotencyKey string `json:"-"`
}

// Create creates a sandbox and returns when it runs.
func (c *Client) Create(ctx context.Context, o CreateOptions) (*Sandbox, error) {
	var s Sandbox
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/sandboxes", json: o, repeatable: true, header: once(o.IdempotencyKey)}, &s); err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	return &s, nil
}

// Get returns a sandbox, one that has ended too.
func (c *Client) Get(ctx context.Context, id string) (*Sandbox, error) {
	var s Sandbox
	if err := c.call(ctx, request{method: http.MethodGet, path: sandboxPath(id, ""), repeatable: true}, &s); err != nil {
		return nil, fmt.Errorf("get sandbox: %w", err)
	}
	return &s, nil
}

// States are the states that a sandbox can be in, for [ListOptions].
var States = []string{"pending", "starting", "running", "missing", "pausing", "paused", "resuming", "stopping", "stopped", "error"}

// ListOptions say which sandboxes to list.
type ListOptions struct {
	States   []string          // none: those that have not ended
	Metadata map[string]string // all must be there
	PageSize int               // 0: the service's default
}

// List lists sandboxes, newest first. An error ends the list.
func (c *Client) List(ctx context.Context, o ListOptions) iter.Seq2[Sandbox, error] {
	q := url.Values{"state": o.States}
	for k, v := range o.Metadata {
		q.Add("metadata", k+"="+v)
	}
	if o.PageSize > 0 {
		q.Set("limit", strconv.Itoa(o.PageSize))
	}
	type page struct {
		Sandboxes []Sandbox `json:"sandboxes"`
		Next      string    `json:"next_cursor"`
	}
	return pages(ctx, c, "/v1/sandboxes", q, func(p page) ([]Sandbox, string) { return p.Sandboxes, p.Next })
}

// pages walks a list page by page.
func pages[P, T any](ctx context.Context, c *Client, path string, q url.Values, split func(P) ([]T, string)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for {
			var p P
			if err := c.call(ctx, request{method: http.MethodGet, path: path, query: q, repeatable: true}, &p); err != nil {
				var none T
				yield(none, fmt.Errorf("list: %w", err))
				return
			}
			entries, next := split(p)
			for _, e := range entries {
				if !yield(e, nil) {
					return
				}
			}
			if next == "" {
				return
			}
			q.Set("cursor", next)
		}
	}
}

// Delete destroys a sandbox. One that has ended is no error.
func (c *Client) Delete(ctx context.Context, id string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: sandboxPath(id, ""), repeatable: true}, nil); err != nil {
		return fmt.Errorf("delete sandbox: %w", err)
	}
	return nil
}

// Ping makes a sandbox live for at least its timeout from now.
func (c *Client) Ping(ctx context.Context, id string) (*Sandbox, error) {
	var s Sandbox
	if err := c.call(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/ping"), repeatable: true}, &s); err != nil {
		return nil, fmt.Errorf("ping sandbox: %w", err)
	}
	return &s, nil
}

// RevokeTokens revokes the tokens of a sandbox, and closes what is open with
// them. The sandbox that it returns has others.
func (c *Client) RevokeTokens(ctx context.Context, id string) (*Sandbox, error) {
	var s Sandbox
	if err := c.call(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/tokens/revoke"), repeatable: true}, &s); err != nil {
		return nil, fmt.Errorf("revoke sandbox's tokens: %w", err)
	}
	return &s, nil
}

// Metrics are what a sandbox uses at a moment.
type Metrics struct {
	Time             time.Time `json:"time"`
	CPUCount         int       `json:"cpu_count"`
	CPUUsedPct       float64   `json:"cpu_used_pct"` // of all CPUs together, 0 to 100
	MemoryTotalBytes int64     `json:"memory_total_bytes"`
	MemoryUsedBytes  int64     `json:"memory_used_bytes"`
	DiskTotalBytes   int64     `json:"disk_total_bytes"`
	DiskUsedBytes    int64     `json:"disk_used_bytes"`
	HostMemoryBytes  int64     `json:"host_memory_bytes"` // what the virtual machine takes
}

// Metrics returns what a sandbox uses now.
func (c *Client) Metrics(ctx context.Context, id string) (*Metrics, error) {
	var m Metrics
	if err := c.call(ctx, request{method: http.MethodGet, path: sandboxPath(id, "/metrics"), repeatable: true}, &m); err != nil {
		return nil, fmt.Errorf("sandbox's metrics: %w", err)
	}
	return &m, nil
}

// Logs returns the end of the guest's console, 64 KiB at most.
func (c *Client) Logs(ctx context.Context, id string) ([]byte, error) {
	resp, err := c.do(ctx, request{method: http.MethodGet, path: sandboxPath(id, "/logs"), repeatable: true})
	if err != nil {
		return nil, fmt.Errorf("sandbox's logs: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("sandbox's logs: %w", err)
	}
	return b, nil
}

// Command is what to run in a sandbox.
type Command struct {
	Cmd            string            `json:"cmd"`
	Args           []string          `json:"args,omitempty"`
	Shell          bool              `json:"shell,omitempty"` // Cmd is a line for sh, without Args
	Envs           map[string]string `json:"envs,omitempty"`
	Cwd            string            `json:"cwd,omitempty"`             // empty: the user's home
	User           string            `json:"user,omitempty"`            // empty: "user"
	TimeoutSeconds int               `json:"timeout_seconds,omitempty"` // 0: 60 for Exec, none for ExecStream
	// Repeatable lets Exec run it again when it is not known whether it ran.
	Repeatable bool `json:"-"`
}

// Result is how a command ended.
type Result struct {
	Stdout    []byte
	Stderr    []byte
	ExitCode  int    // 128 + N where signal N ended it
	Error     string // why it did not exit by itself
	TimedOut  bool
	Truncated bool // output beyond 16 MiB a stream was dropped
	Duration  time.Duration
}

// Exec runs a command to its end, with stdin as the whole of its standard
// input. Another exit code than 0 is no error.
func (c *Client) Exec(ctx context.Context, id string, cmd Command, stdin []byte) (*Result, error) {
	body := struct {
		Command
		Stdin         string `json:"stdin,omitempty"`
		StdinEncoding string `json:"stdin_encoding,omitempty"`
	}{Command: cmd, Stdin: string(stdin)}
	if !utf8.Valid(stdin) {
		body.Stdin, body.StdinEncoding = base64.StdEncoding.EncodeToString(stdin), "base64"
	}
	var r struct {
		Stdout     string `json:"stdout"`
		Stderr     string `json:"stderr"`
		Encoding   string `json:"encoding"`
		ExitCode   int    `json:"exit_code"`
		Error      string `json:"error"`
		TimedOut   bool   `json:"timed_out"`
		Truncated  bool   `json:"truncated"`
		DurationMS int64  `json:"duration_ms"`
	}
	if err := c.call(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/exec"), json: body, repeatable: cmd.Repeatable}, &r); err != nil {
		return nil, fmt.Errorf("run command: %w", err)
	}
	out := &Result{
		Stdout: []byte(r.Stdout), Stderr: []byte(r.Stderr), ExitCode: r.ExitCode, Error: r.Error,
		TimedOut: r.TimedOut, Truncated: r.Truncated, Duration: time.Duration(r.DurationMS) * time.Millisecond,
	}
	if r.Encoding == "base64" {
		var err error
		if out.Stdout, err = base64.StdEncoding.DecodeString(r.Stdout); err != nil {
			return nil, fmt.Errorf("run command: read output: %w", err)
		}
		if out.Stderr, err = base64.StdEncoding.DecodeString(r.Stderr); err != nil {
			return nil, fmt.Errorf("run command: read output: %w", err)
		}
	}
	return out, nil
}

// FileInfo is a file that was written.
type FileInfo struct {
	Path string `json:"path"`
	Name string `json:"name"`
	Size int64  `json:"size"`
}

func fileQuery(path, user string) url.Values {
	q := url.Values{"path": {path}}
	if user != "" {
		q.Set("user", user)
	}
	return q
}

// ReadFile opens a file of a sandbox for reading, as a user, "user" when
// empty. Reading fails where the connection breaks before the file's end.
func (c *Client) ReadFile(ctx context.Context, id, path, user string) (io.ReadCloser, error) {
	return c.open(ctx, "read file", sandboxPath(id, "/files"), fileQuery(path, user))
}

// ReadArchive opens a file or folder of a sandbox as a tar archive, in which
// its base name is the top entry.
func (c *Client) ReadArchive(ctx context.Context, id, path, user string) (io.ReadCloser, error) {
	return c.open(ctx, "read archive", sandboxPath(id, "/archive"), fileQuery(path, user))
}

func (c *Client) open(ctx context.Context, what, path string, q url.Values) (io.ReadCloser, error) {
	resp, err := c.do(ctx, request{method: http.MethodGet, path: path, query: q, repeatable: true})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return resp.Body, nil
}

// WriteFile writes what r gives to a file of a sandbox, whose folder is made.
func (c *Client) WriteFile(ctx context.Context, id, path, user string, r io.Reader) (*FileInfo, error) {
	return c.put(ctx, "write file", sandboxPath(id, "/files"), fileQuery(path, user), "application/octet-stream", r)
}

// WriteArchive unpacks a tar archive into a folder of a sandbox.
func (c *Client) WriteArchive(ctx context.Context, id, dir, user string, r io.Reader) (*FileInfo, error) {
	return c.put(ctx, "write archive", sandboxPath(id, "/archive"), fileQuery(dir, user), "application/x-tar", r)
}

func (c *Client) put(ctx context.Context, what, path string, q url.Values, contentType string, r io.Reader) (*FileInfo, error) {
	var f FileInfo
	err := c.call(ctx, request{method: http.MethodPut, path: path, query: q, body: r, header: http.Header{"Content-Type": {contentType}}}, &f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return &f, nil
}
