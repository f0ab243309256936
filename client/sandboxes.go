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

// Sandbox is one VM with its disk, memory and address. Times of events that have not
// happened are nil.
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
	EndedBecause   string            `json:"ended_because,omitempty"` // the reason in words
	Condition      *Condition        `json:"condition,omitempty"`     // a fault, beside its state
	Error          string            `json:"error,omitempty"`
	StartMS        int64             `json:"start_ms,omitempty"`
	AccessToken    string            `json:"access_token"`
	TrafficToken   string            `json:"traffic_token"`
	URL            string            `json:"url"` // of a port, with the placeholder "{port}"
}

// Condition is a fault of a sandbox, beside its state.
type Condition struct {
	// Kind is Unresponsive or MemoryLost.
	Kind    string    `json:"kind"`
	Reason  string    `json:"reason"` // such as "oom"
	Message string    `json:"message"`
	Since   time.Time `json:"since"`
}

// The kinds of conditions.
const (
	// Unresponsive means that the sandbox runs but its guest does not answer.
	Unresponsive = "unresponsive"
	// MemoryLost means that the sandbox is paused and has only its disk, from which it
	// boots when it is resumed, rebooted or used.
	MemoryLost = "memory_lost"
)

// What the service does with a sandbox that was not used for its timeout.
const (
	DestroyOnTimeout = "destroy"
	PauseOnTimeout   = "pause"
)

// CreateOptions configure a new sandbox. Zero fields have the service's defaults.
type CreateOptions struct {
	Template  string `json:"template,omitempty"`
	VCPUs     int    `json:"vcpus,omitempty"`
	MemoryMiB int    `json:"memory_mib,omitempty"`
	DiskMiB   int    `json:"disk_mib,omitempty"`
	// TimeoutSeconds is the idle time after which the sandbox is destroyed or paused
	// (nil: the service's default; 0: never).
	TimeoutSeconds *int `json:"timeout_seconds,omitempty"`
	// OnTimeout is DestroyOnTimeout (the default) or PauseOnTimeout.
	OnTimeout string `json:"on_timeout,omitempty"`
	// AutoResume resumes a paused sandbox at the next call or request that uses it (nil:
	// true if OnTimeout is PauseOnTimeout).
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

// Get returns a sandbox, even if it has ended.
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
	Metadata map[string]string // a sandbox must have all of it
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

// pages lists all items of a paginated list.
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

// Delete destroys a sandbox. Deleting a sandbox that has ended is not an error.
func (c *Client) Delete(ctx context.Context, id string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: sandboxPath(id, ""), repeatable: true}, nil); err != nil {
		return fmt.Errorf("delete sandbox: %w", err)
	}
	return nil
}

// Ping counts as a use of a sandbox: its timeout starts anew.
func (c *Client) Ping(ctx context.Context, id string) (*Sandbox, error) {
	var s Sandbox
	if err := c.call(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/ping"), repeatable: true}, &s); err != nil {
		return nil, fmt.Errorf("ping sandbox: %w", err)
	}
	return &s, nil
}

// RevokeTokens revokes a sandbox's tokens, closes what was opened with them, and returns
// the sandbox with new ones.
func (c *Client) RevokeTokens(ctx context.Context, id string) (*Sandbox, error) {
	var s Sandbox
	if err := c.call(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/tokens/revoke"), repeatable: true}, &s); err != nil {
		return nil, fmt.Errorf("revoke sandbox's tokens: %w", err)
	}
	return &s, nil
}

// Metrics are the resources that a sandbox uses at a moment.
type Metrics struct {
	Time             time.Time `json:"time"`
	CPUCount         int       `json:"cpu_count"`
	CPUUsedPct       float64   `json:"cpu_used_pct"` // of all CPUs together, 0 to 100
	MemoryTotalBytes int64     `json:"memory_total_bytes"`
	MemoryUsedBytes  int64     `json:"memory_used_bytes"`
	DiskTotalBytes   int64     `json:"disk_total_bytes"`
	DiskUsedBytes    int64     `json:"disk_used_bytes"`
	HostMemoryBytes  int64     `json:"host_memory_bytes"` // that the VM takes from its host
}

// Metrics returns the resources that a sandbox uses now.
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

// Command is a command to run in a sandbox.
type Command struct {
	Cmd            string            `json:"cmd"`
	Args           []string          `json:"args,omitempty"`
	Shell          bool              `json:"shell,omitempty"` // Cmd is a shell command, and Args is empty
	Envs           map[string]string `json:"envs,omitempty"`
	Cwd            string            `json:"cwd,omitempty"`             // empty: the user's home
	User           string            `json:"user,omitempty"`            // empty: "user"
	TimeoutSeconds int               `json:"timeout_seconds,omitempty"` // 0: 60 for Exec, none for ExecStream
	// Repeatable lets Exec retry the command if it may already have run.
	Repeatable bool `json:"-"`
}

// Result is how a command ended.
type Result struct {
	Stdout    []byte
	Stderr    []byte
	ExitCode  int    // 128 + N if signal N ended it
	Error     string // why it did not exit by itself
	TimedOut  bool
	Truncated bool // output beyond 16 MiB per stream was dropped
	Duration  time.Duration
}

// execRequest is the body of Exec.
type execRequest struct {
	Command
	Stdin         string `json:"stdin,omitempty"`
	StdinEncoding string `json:"stdin_encoding,omitempty"`
}

// execResult is the response to an execRequest.
type execResult struct {
	Stdout     string `json:"stdout"`
	Stderr     string `json:"stderr"`
	Encoding   string `json:"encoding"`
	ExitCode   int    `json:"exit_code"`
	Error      string `json:"error"`
	TimedOut   bool   `json:"timed_out"`
	Truncated  bool   `json:"truncated"`
	DurationMS int64  `json:"duration_ms"`
}

// Exec runs a command with stdin as its standard input and returns when it has ended. An
// exit code other than 0 is not an error.
func (c *Client) Exec(ctx context.Context, id string, cmd Command, stdin []byte) (*Result, error) {
	body := execRequest{Command: cmd, Stdin: string(stdin)}
	if !utf8.Valid(stdin) {
		body.Stdin, body.StdinEncoding = base64.StdEncoding.EncodeToString(stdin), "base64"
	}
	var r execResult
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

// FileInfo describes a file that was written.
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

// ReadFile opens a file of a sandbox for reading, with the rights of user (empty:
// "user"). Reading fails if the connection breaks before the end of the file.
func (c *Client) ReadFile(ctx context.Context, id, path, user string) (io.ReadCloser, error) {
	return c.open(ctx, "read file", sandboxPath(id, "/files"), fileQuery(path, user))
}

// ReadArchive opens a file or folder of a sandbox as a tar archive, whose top entry is
// its base name.
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

// WriteFile writes the content of r to a file of a sandbox, and creates its folder.
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
