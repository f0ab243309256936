package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
)

// ImportOptions say which OCI image to import, and how.
type ImportOptions struct {
	// Name is the template's name; the image becomes its latest version.
	Name string
	// Reference names the image in a registry, as for `docker pull`. Username and
	// Password are for the registry (empty: anonymous).
	Reference, Username, Password string
	// Archive is used if there is no Reference: the output of `docker save`, or a tar of
	// an OCI image layout, either may be gzipped. Tag selects one of several images.
	Archive io.Reader
	Tag     string
	DiskMiB int // size of the template's disk; 0: the service's default
	// Inert does not start the image's entry point.
	Inert bool
	// Platform makes a template that every team sees. Only the platform's admins may.
	Platform bool
}

// importRequest is the body of an import from a registry.
type importRequest struct {
	Name      string `json:"name"`
	Reference string `json:"reference"`
	Username  string `json:"username,omitempty"`
	Password  string `json:"password,omitempty"`
	DiskMiB   int    `json:"disk_mib,omitempty"`
	Inert     bool   `json:"inert,omitempty"`
}

// Import makes a template from an OCI image and returns when sandboxes can start from
// it.
func (c *Client) Import(ctx context.Context, o ImportOptions) (*Template, error) {
	path := "/v1/templates/import"
	if o.Platform {
		path = "/v1/admin/templates/import"
	}
	// Not retried: the template may exist.
	r := request{method: http.MethodPost, path: path}
	if o.Archive == nil {
		r.json = importRequest{o.Name, o.Reference, o.Username, o.Password, o.DiskMiB, o.Inert}
	} else {
		r.path += "/archive"
		r.query = url.Values{"name": {o.Name}}
		if o.Tag != "" {
			r.query.Set("tag", o.Tag)
		}
		if o.DiskMiB != 0 {
			r.query.Set("disk_mib", strconv.Itoa(o.DiskMiB))
		}
		if o.Inert {
			r.query.Set("inert", "true")
		}
		r.body, r.header = o.Archive, http.Header{"Content-Type": {"application/x-tar"}}
	}
	var t Template
	if err := c.call(ctx, r, &t); err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	return &t, nil
}
