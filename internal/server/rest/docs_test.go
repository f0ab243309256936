package rest

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDocs checks that the API reference is complete, compressed or not, and that
// browsers cache it.
func TestDocs(t *testing.T) {
	d, err := renderDocs()
	if err != nil {
		t.Fatal(err)
	}
	get := func(header ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest("GET", "/docs", nil)
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		w := httptest.NewRecorder()
		(&API{}).GetDocs(w, r)
		return w
	}
	plain := get()
	if !bytes.Equal(plain.Body.Bytes(), d.page) || plain.Header().Get("Content-Encoding") != "" {
		t.Errorf("without compression: %d bytes, %v", plain.Body.Len(), plain.Header())
	}
	for _, accepts := range []string{"gzip", "br, gzip;q=0.5", "deflate,GZIP"} {
		w := get("Accept-Encoding", accepts)
		z, err := gzip.NewReader(w.Body)
		if err != nil {
			t.Fatalf("%s: %v, %v", accepts, err, w.Header())
		}
		if page, err := io.ReadAll(z); err != nil || !bytes.Equal(page, d.page) || w.Header().Get("Content-Encoding") != "gzip" {
			t.Errorf("%s: %d bytes, %v, %v", accepts, len(page), err, w.Header())
		}
	}
	for _, accepts := range []string{"br", "gzip;q=0", "gzip; q=0.0"} {
		if w := get("Accept-Encoding", accepts); w.Header().Get("Content-Encoding") != "" {
			t.Errorf("%s: %v", accepts, w.Header())
		}
	}
	if w := get("If-None-Match", plain.Header().Get("ETag")); w.Code != http.StatusNotModified || w.Body.Len() != 0 {
		t.Errorf("a cached page: %d, %d bytes", w.Code, w.Body.Len())
	}

	page := string(d.page)
	for _, want := range []string{"/v1/sandboxes/{sandbox_id}/exec/stream", "Idempotency-Key", `"CreateSandbox":`} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if strings.Contains(page, "{{") && regexp.MustCompile(`\{\{(viewer|document|script)\}\}`).MatchString(page) {
		t.Error("a part of the page is missing")
	}
	if n := strings.Count(page, "</script>"); n != 3 {
		t.Errorf("the page has %d ends of scripts, want 3: some content ends a script", n)
	}
	if strings.Contains(page, viewerLogo) || strings.Contains(page, "cdn.redoc") {
		t.Error("the viewer loads something from another origin")
	}
}

// TestDocsInBrowser opens the API reference in a browser.
func TestDocsInBrowser(t *testing.T) {
	const browserTests = "../../../test/browser"
	if _, err := exec.LookPath("chromium"); err != nil {
		t.Skip("needs chromium")
	}
	if _, err := os.Stat(filepath.Join(browserTests, "node_modules/.bin/playwright")); err != nil {
		t.Skip("needs Playwright: npm ci --prefix test/browser")
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /docs", (&API{}).GetDocs)
	mux.HandleFunc("GET /favicon.ico", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	s := httptest.NewServer(mux)
	defer s.Close()
	cmd := exec.CommandContext(t.Context(), "node_modules/.bin/playwright", "test", "docs.spec.js")
	cmd.Dir = browserTests
	cmd.Env = append(os.Environ(), "WRENN_URL="+s.URL, "WRENN_BROWSER_OUT="+filepath.Join(t.ArtifactDir(), "docs"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("playwright: %v\n%s", err, out)
	}
}
