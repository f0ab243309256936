package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"time"
)

// BuildOptions configure a build. Zero fields have the service's defaults.
type BuildOptions struct {
	Name string   `json:"name"`           // of the template
	Tags []string `json:"tags,omitempty"` // none: "latest"
	// Recipe is the recipe's text. Archive is the digest of the folder that COPY copies
	// from (see UploadArchive); empty if the recipe copies nothing.
	Recipe  string `json:"recipe"`
	Archive string `json:"archive,omitempty"`
	// Registry has the credentials for the registry of FROM oci: (nil: anonymous).
	Registry            *Registry `json:"registry,omitempty"`
	VCPUs               int       `json:"vcpus,omitempty"`
	MemoryMiB           int       `json:"memory_mib,omitempty"`
	DiskMiB             int       `json:"disk_mib,omitempty"`
	NoCache             bool      `json:"no_cache,omitempty"`      // run every step
	SkipPrePost         bool      `json:"skip_pre_post,omitempty"` // leave apt's lists alone
	StepTimeoutSeconds  int       `json:"step_timeout_seconds,omitempty"`
	PhaseTimeoutSeconds int       `json:"phase_timeout_seconds,omitempty"`
}

// Registry has the credentials for an image registry.
type Registry struct {
	Username string `json:"username"`
	Password string `json:"password"`
}

// Build is the work that turns a recipe into a template.
type Build struct {
	ID         string      `json:"id"`
	TeamID     string      `json:"team_id"`
	Name       string      `json:"name"`
	Tags       []string    `json:"tags"`
	State      string      `json:"state"`           // queued, running, succeeded, failed, cancelled
	Error      string      `json:"error,omitempty"` // why it failed
	TotalSteps int         `json:"total_steps"`     // including those before and after the recipe
	DoneSteps  int         `json:"done_steps"`
	Attempts   int         `json:"attempts,omitempty"`    // how often a worker began it
	TemplateID string      `json:"template_id,omitempty"` // the result
	Version    int         `json:"version,omitempty"`     // the template's
	Recipe     string      `json:"recipe,omitempty"`
	Steps      []BuildStep `json:"steps,omitempty"` // not in lists
	CreatedAt  time.Time   `json:"created_at"`
	StartedAt  *time.Time  `json:"started_at,omitempty"`
	EndedAt    *time.Time  `json:"ended_at,omitempty"`
}

// Ended reports whether the build has succeeded, failed or been cancelled.
func (b *Build) Ended() bool { return b.State != "queued" && b.State != "running" }

// BuildStep is one step of a build.
type BuildStep struct {
	Number     int        `json:"number"`
	Phase      string     `json:"phase"` // pre, recipe, post, capture
	Text       string     `json:"text"`
	State      string     `json:"state"` // pending, running, succeeded, failed, cached, skipped, cancelled
	Output     string     `json:"output"`
	Truncated  bool       `json:"truncated,omitempty"` // the rest was dropped, except Tail at its end
	Tail       string     `json:"tail,omitempty"`
	ExitCode   *int       `json:"exit_code,omitempty"`
	Error      string     `json:"error,omitempty"`
	StartedAt  *time.Time `json:"started_at,omitempty"`
	DurationMS int64      `json:"duration_ms,omitempty"`
}

const buildsPath = "/v1/templates/builds"

// Build queues a build and returns. FollowBuild waits for it.
func (c *Client) Build(ctx context.Context, o BuildOptions) (*Build, error) {
	var b Build
	// Not retried: the build may be queued.
	if err := c.call(ctx, request{method: http.MethodPost, path: buildsPath, json: o}, &b); err != nil {
		return nil, fmt.Errorf("build template: %w", err)
	}
	return &b, nil
}

// UploadArchive uploads the folder that a recipe copies from, packed as docs/recipes.md
// says. digest is "sha256:" and the archive's SHA-256.
func (c *Client) UploadArchive(ctx context.Context, digest string, r io.Reader) error {
	err := c.call(ctx, request{method: http.MethodPut, path: buildsPath + "/archives/" + url.PathEscape(digest), body: r, header: http.Header{"Content-Type": {"application/x-tar"}}}, nil)
	if err != nil {
		return fmt.Errorf("upload folder: %w", err)
	}
	return nil
}

// GetBuild returns a build with its steps.
func (c *Client) GetBuild(ctx context.Context, id string) (*Build, error) {
	var b Build
	if err := c.call(ctx, request{method: http.MethodGet, path: buildPath(id, ""), repeatable: true}, &b); err != nil {
		return nil, fmt.Errorf("look up build: %w", err)
	}
	return &b, nil
}

// Builds lists the team's builds, newest first. An error ends the list.
func (c *Client) Builds(ctx context.Context) iter.Seq2[Build, error] {
	type page struct {
		Builds []Build `json:"builds"`
		Next   string  `json:"next_cursor"`
	}
	return pages(ctx, c, buildsPath, url.Values{}, func(p page) ([]Build, string) { return p.Builds, p.Next })
}

// CancelBuild cancels a build. A running build stops shortly afterwards. Cancelling a
// finished build is not an error.
func (c *Client) CancelBuild(ctx context.Context, id string) (*Build, error) {
	var b Build
	if err := c.call(ctx, request{method: http.MethodPost, path: buildPath(id, "/cancel"), repeatable: true}, &b); err != nil {
		return nil, fmt.Errorf("cancel build: %w", err)
	}
	return &b, nil
}

// BuildEvent reports progress of a build.
type BuildEvent struct {
	Type   string     `json:"type"`             // step, output or end
	Step   *BuildStep `json:"step,omitempty"`   // step: its new state, without output
	Number int        `json:"number,omitempty"` // output: the step's number
	Data   string     `json:"data,omitempty"`   // output: what the step printed
	Build  *Build     `json:"build,omitempty"`  // end: the finished build
}

// maxEvent bounds one event, in bytes.
const maxEvent = 8 << 20

// FollowBuild calls see for each event of a build, past and future, and returns the
// finished build.
func (c *Client) FollowBuild(ctx context.Context, id string, see func(BuildEvent)) (*Build, error) {
	resp, err := c.do(ctx, request{method: http.MethodGet, path: buildPath(id, "/logs"), repeatable: true})
	if err != nil {
		return nil, fmt.Errorf("follow build: %w", err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxEvent)
	for lines.Scan() {
		data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
		if !ok {
			continue
		}
		var e BuildEvent
		if err := json.Unmarshal(data, &e); err != nil {
			return nil, fmt.Errorf("follow build: read event: %w", err)
		}
		see(e)
		if e.Type == "end" && e.Build != nil {
			return e.Build, nil
		}
	}
	err = lines.Err()
	if err == nil {
		err = errors.New("the connection broke before the build ended")
	}
	return nil, fmt.Errorf("follow build: %w", err)
}

func buildPath(id, rest string) string { return buildsPath + "/" + url.PathEscape(id) + rest }
