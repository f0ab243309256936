package client

import (
	"context"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"time"
)

// Template is what sandboxes can start from.
type Template struct {
	ID        string    `json:"id"`
	TeamID    string    `json:"team_id"`
	Name      string    `json:"name"`
	Version   int       `json:"version"`              // counts the templates of its name
	Tags      []string  `json:"tags"`                 // it is what "name:tag" means
	SizeBytes int64     `json:"size_bytes"`           // what it takes on the host's disk
	VCPUs     int       `json:"vcpus,omitempty"`      // its sandboxes have; 0: what they ask for
	MemoryMiB int       `json:"memory_mib,omitempty"` // its sandboxes have; 0: what they ask for
	DiskMiB   int       `json:"disk_mib"`             // its sandboxes have at least; 0: not known
	SandboxID string    `json:"sandbox_id,omitempty"` // that it was captured from
	CreatedAt time.Time `json:"created_at"`
	// Limits bound what each of its sandboxes uses of its host; nil: only the host's
	// own limits do.
	Limits *TemplateLimits `json:"limits,omitempty"`
	// FailedImport is the last import of its name, where that has failed; only
	// [Client.Template] says so.
	FailedImport *FailedImport `json:"failed_import,omitempty"`
}

// TemplateLimits are how much of its host's disk and network a sandbox may use per
// second. 0: the template does not limit that.
type TemplateLimits struct {
	DiskBytes  int64 `json:"disk_bytes,omitempty"`  // read and written, together
	DiskOps    int64 `json:"disk_ops,omitempty"`    // reads and writes, together
	NetBytes   int64 `json:"net_bytes,omitempty"`   // sent, and separately received
	NetPackets int64 `json:"net_packets,omitempty"` // sent, and separately received
}

// FailedImport is an import of an image that came to nothing.
type FailedImport struct {
	Error    string    `json:"error"` // why
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

// Template returns what ref names: "name" (its latest version), "name:tag",
// "name@version" or an id.
func (c *Client) Template(ctx context.Context, ref string) (*Template, error) {
	var t Template
	if err := c.call(ctx, request{method: http.MethodGet, path: templatePath(ref, ""), repeatable: true}, &t); err != nil {
		return nil, fmt.Errorf("look up template: %w", err)
	}
	return &t, nil
}

// DeleteTemplate removes a template of the team: all versions of a name alone,
// else the one that ref names. Sandboxes that started from it go on.
func (c *Client) DeleteTemplate(ctx context.Context, ref string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: templatePath(ref, ""), repeatable: true}, nil); err != nil {
		return fmt.Errorf("delete template: %w", err)
	}
	return nil
}

// TagTemplate has tag, of the template's name, mean what ref names from now on.
func (c *Client) TagTemplate(ctx context.Context, ref, tag string) (*Template, error) {
	var t Template
	if err := c.call(ctx, request{method: http.MethodPut, path: templatePath(ref, "/tags/"+url.PathEscape(tag)), repeatable: true}, &t); err != nil {
		return nil, fmt.Errorf("tag template: %w", err)
	}
	return &t, nil
}

// UntagTemplate takes a tag away from the templates of a name. A built template
// without any tag is removed once no sandbox of it is there.
func (c *Client) UntagTemplate(ctx context.Context, name, tag string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: templatePath(name, "/tags/"+url.PathEscape(tag)), repeatable: true}, nil); err != nil {
		return fmt.Errorf("remove tag: %w", err)
	}
	return nil
}

func templatePath(ref, rest string) string { return "/v1/templates/" + url.PathEscape(ref) + rest }
