package client

import (
	"context"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"time"
)

// Template is what sandboxes start from: a disk and, if it was captured running, memory.
type Template struct {
	ID        string    `json:"id"`
	TeamID    string    `json:"team_id"`
	Name      string    `json:"name"`
	Version   int       `json:"version"`              // counted per name, from 1
	Tags      []string  `json:"tags"`                 // of this version, as in "name:tag"
	SizeBytes int64     `json:"size_bytes"`           // on the host's disk
	VCPUs     int       `json:"vcpus,omitempty"`      // of its sandboxes; 0: each chooses
	MemoryMiB int       `json:"memory_mib,omitempty"` // of its sandboxes; 0: each chooses
	DiskMiB   int       `json:"disk_mib"`             // least size of its sandboxes' disks; 0: not known
	SandboxID string    `json:"sandbox_id,omitempty"` // the sandbox that it was captured from
	CreatedAt time.Time `json:"created_at"`
	// Limits bound how much each of its sandboxes uses of its host (nil: only the host's
	// own limits apply).
	Limits *TemplateLimits `json:"limits,omitempty"`
	// FailedImport is the last import under its name, if that failed. Only
	// [Client.Template] sets it.
	FailedImport *FailedImport `json:"failed_import,omitempty"`
}

// TemplateLimits are how much of its host's disk and network a sandbox may use per
// second (0: the template does not limit it).
type TemplateLimits struct {
	DiskBytes  int64 `json:"disk_bytes,omitempty"`  // read and written, together
	DiskOps    int64 `json:"disk_ops,omitempty"`    // reads and writes, together
	NetBytes   int64 `json:"net_bytes,omitempty"`   // sent, and separately received
	NetPackets int64 `json:"net_packets,omitempty"` // sent, and separately received
}

// FailedImport is an import of an image that failed.
type FailedImport struct {
	Error    string    `json:"error"`
	FailedAt time.Time `json:"failed_at"`
}

// Templates lists templates by name. An error ends the list.
func (c *Client) Templates(ctx context.Context) iter.Seq2[Template, error] {
	type page struct {
		Templates []Template `json:"templates"`
		Next      string     `json:"next_cursor"`
	}
	return pages(ctx, c, "/v1/templates", url.Values{}, func(p page) ([]Template, string) { return p.Templates, p.Next })
}

// Template returns the template that ref names: "name" (its latest version), "name:tag",
// "name@version" or an id.
func (c *Client) Template(ctx context.Context, ref string) (*Template, error) {
	var t Template
	if err := c.call(ctx, request{method: http.MethodGet, path: templatePath(ref, ""), repeatable: true}, &t); err != nil {
		return nil, fmt.Errorf("look up template: %w", err)
	}
	return &t, nil
}

// DeleteTemplate removes a template of the team. "name" removes all versions; any other
// reference removes one. Sandboxes that started from it are not affected.
func (c *Client) DeleteTemplate(ctx context.Context, ref string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: templatePath(ref, ""), repeatable: true}, nil); err != nil {
		return fmt.Errorf("delete template: %w", err)
	}
	return nil
}

// TagTemplate sets a tag to the version that ref names, and moves it there if it exists.
func (c *Client) TagTemplate(ctx context.Context, ref, tag string) (*Template, error) {
	var t Template
	if err := c.call(ctx, request{method: http.MethodPut, path: templatePath(ref, "/tags/"+url.PathEscape(tag)), repeatable: true}, &t); err != nil {
		return nil, fmt.Errorf("tag template: %w", err)
	}
	return &t, nil
}

// UntagTemplate removes a tag of the template name. The service removes a built version
// without tags once no sandbox uses it.
func (c *Client) UntagTemplate(ctx context.Context, name, tag string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: templatePath(name, "/tags/"+url.PathEscape(tag)), repeatable: true}, nil); err != nil {
		return fmt.Errorf("remove tag: %w", err)
	}
	return nil
}

func templatePath(ref, rest string) string { return "/v1/templates/" + url.PathEscape(ref) + rest }
