package rest

import (
	"context"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5"
)

func newAPI(t *testing.T) *API {
	t.Helper()
	a, err := New(context.Background(), Config{PublicURL: "http://localhost:8000", Domain: "localhost", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestRoutes walks the router and the document: each has what the other has.
func TestRoutes(t *testing.T) {
	a := newAPI(t)
	var routed, documented []string
	err := chi.Walk(a.chi, func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		routed = append(routed, method+" "+route)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for path, item := range a.spec.Paths.Map() {
		for method := range item.Operations() {
			documented = append(documented, method+" "+path)
		}
	}
	slices.Sort(routed)
	slices.Sort(documented)
	if !slices.Equal(routed, documented) {
		t.Errorf("router:\n%s\n\ndocument:\n%s", strings.Join(routed, "\n"), strings.Join(documented, "\n"))
	}
	if len(routed) < 15 {
		t.Errorf("only %d routes", len(routed))
	}
}

// TestDocumented checks that the document says of every route what it must.
func TestDocumented(t *testing.T) {
	for path, item := range newAPI(t).spec.Paths.Map() {
		for method, op := range item.Operations() {
			open := op.Security != nil && len(*op.Security) == 0
			// Agents have tokens of their own, which their operations check.
			if open != (!strings.HasPrefix(path, "/v1/") || strings.HasPrefix(path, "/v1/hosts/") || op.Tags[0] == "login") {
				t.Errorf("%s %s: open = %v", method, path, open)
			}
			if op.Summary == "" || op.OperationID == "" || len(op.Tags) != 1 {
				t.Errorf("%s %s: wants a summary, an id and a tag", method, path)
			}
			if !open && (op.Responses.Status(401) == nil || op.Responses.Default() == nil) {
				t.Errorf("%s %s: does not say how it fails", method, path)
			}
			if open && op.Responses.Status(429) == nil {
				t.Errorf("%s %s: does not say that how often it may be called is bounded", method, path)
			}
			for _, p := range append(slices.Clone(item.Parameters), op.Parameters...) {
				if p.Value.Description == "" {
					t.Errorf("%s %s: parameter %s has no description", method, path, p.Value.Name)
				}
			}
		}
	}
}

func TestOrigin(t *testing.T) {
	a := newAPI(t)
	for origin, want := range map[string]bool{
		"": true, "http://api.local": true, "http://localhost:8000": true, "http://API.local": true,
		"http://evil.example": false, "null": false, "http://localhost:8001": false, "http://localhost:8000.evil.example": false, "://": false,
		"http://8000-cl-x.localhost:8000": false,
	} {
		r := &http.Request{Host: "api.local", Header: http.Header{}}
		if origin != "" {
			r.Header.Set("Origin", origin)
		}
		if got := a.originAllowed(r); got != want {
			t.Errorf("origin %q: %v, want %v", origin, got, want)
		}
	}
}

func FuzzParseRange(f *testing.F) {
	for _, s := range []string{"bytes=0-1", "bytes=-5", "bytes=5-", "bytes=9223372036854775807-", "bytes=0-9223372036854775807", "bytes=-", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		r, ok := parseRange(header)
		if !ok {
			return
		}
		if r.first < -1 || r.suffix < 0 || r.last < -1 || r.first >= 0 && r.last >= 0 && r.last-r.first+1 <= 0 {
			t.Errorf("parseRange(%q) = %+v", header, r)
		}
	})
}
