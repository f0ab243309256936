package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
)

// ImportOptions say what template to make of an OCI image.
type ImportOptions struct {
	// Name is the template's; the image becomes its latest version.
	Name string
	// Reference is where a registry has the image, as `docker pull` takes it, and
	// Username and Password what the registry is shown, if anything.
	Reference, Username, Password string
	// Archive, where there is no Reference, is what `docker save` writes or a tar
	// of an OCI image layout, compressed with gzip or not; Tag is the image's name
	// in it, which is needed if there are several.
	Archive io.Reader
	Tag     string
	DiskMiB int // size of the template's disk; 0: the service's default
	// Inert keeps the image's entry point from being started.
	Inert bool
	// Platform makes a template that every team sees; for the platform's admins.
	Platform bool
}

// Import makes a template of an OCI image and returns when sandboxes can be
// started from it.
func (c *Client) Import(ctx context.Context, o ImportOptions) (*Template, error) {
	path := "/v1/templates/import"
	if o.Platform {
		path = "/v1/admin/templates/import"
	}
	// Not repeated: the template may have been made.
	r := request{method: http.MethodPost, path: path}
	if o.Archive == nil {
		r.json = struct {
			Name      string `json:"name"`
			Reference string `json:"reference"`
			Username  string `json:"username,omitempty"`
			Password  string `json:"password,omitempty"`
			DiskMiB   int    `json:"disk_mib,omitempty"`
			Inert     bool   `json:"inert,omitempty"`
		}{o.Name, o.Reference, o.Username, o.Password, o.DiskMiB, o.Inert}
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
