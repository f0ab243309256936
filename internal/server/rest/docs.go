package rest

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync"

	"go.yaml.in/yaml/v4"

	"github.com/wrenn-dev/wrenn/api"
)

var (
	// viewer is Redoc; redoc/update downloads it.
	//
	//go:embed redoc/redoc.standalone.js
	viewer string
	//go:embed docs.js
	docsScript string
	//go:embed docs.html
	docsPage string
)

// viewerLogo is the only resource that the viewer loads from another origin.
const viewerLogo = "https://cdn.redoc.ly/redoc/logo-mini.svg"

// docs is the self-contained page that shows the OpenAPI document.
type docs struct {
	page, compressed []byte
	etag             string
	// policy is the page's Content-Security-Policy. It allows the page's two scripts and
	// the viewer's search worker, and no other resources.
	policy string
}

// renderDocs renders the page once; it is the same for every API.
var renderDocs = sync.OnceValues(func() (docs, error) {
	var spec any
	if err := yaml.Unmarshal(api.OpenAPI, &spec); err != nil {
		return docs{}, fmt.Errorf("read OpenAPI document: %w", err)
	}
	document, err := json.Marshal(spec) // Marshal escapes <.
	if err != nil {
		return docs{}, fmt.Errorf("encode OpenAPI document: %w", err)
	}
	script := strings.ReplaceAll(viewer, viewerLogo, "data:,")
	page := strings.NewReplacer("{{viewer}}", script, "{{document}}", string(document), "{{script}}", docsScript).Replace(docsPage)
	var compressed bytes.Buffer
	z, err := gzip.NewWriterLevel(&compressed, gzip.BestCompression)
	if err != nil {
		return docs{}, err
	}
	if _, err := z.Write([]byte(page)); err != nil {
		return docs{}, err
	}
	if err := z.Close(); err != nil {
		return docs{}, err
	}
	sum := sha256.Sum256([]byte(page))
	return docs{
		page: []byte(page), compressed: compressed.Bytes(), etag: `"` + hex.EncodeToString(sum[:8]) + `"`,
		policy: fmt.Sprintf("default-src 'none'; script-src %s %s; style-src 'unsafe-inline'; img-src data:; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'", scriptHash(script), scriptHash(docsScript)),
	}, nil
})

// scriptHash returns the policy's source expression for an inline script.
func scriptHash(script string) string {
	sum := sha256.Sum256([]byte(script))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// GetDocs answers GET /docs.
func (a *API) GetDocs(w http.ResponseWriter, r *http.Request) {
	d, err := renderDocs()
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", d.policy)
	h.Set("ETag", d.etag)
	h.Set("Cache-Control", "no-cache") // Browsers revalidate and get 304.
	h.Set("Vary", "Accept-Encoding")
	if r.Header.Get("If-None-Match") == d.etag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	body := d.page
	if acceptsGzip(r.Header.Get("Accept-Encoding")) {
		h.Set("Content-Encoding", "gzip")
		body = d.compressed
	}
	_, _ = w.Write(body)
}

// refused matches the weight of a coding that the client refuses.
var refused = regexp.MustCompile(`^\s*q=0(\.0*)?\s*$`)

// acceptsGzip reports whether an Accept-Encoding field accepts gzip.
func acceptsGzip(field string) bool {
	for item := range strings.SplitSeq(field, ",") {
		coding, weight, _ := strings.Cut(item, ";")
		if strings.EqualFold(strings.TrimSpace(coding), "gzip") {
			return !refused.MatchString(weight)
		}
	}
	return false
}
