package rest

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5"
)

func TestFind(t *testing.T) {
	routes := newAPI(t).routes
	for path, want := range map[string]struct {
		path   string
		params map[string]string
		allow  string
	}{
		"/v1/sandboxes":                {"/v1/sandboxes", map[string]string{}, "GET, HEAD, OPTIONS, POST"},
		"/v1/%73andboxes":              {"/v1/sandboxes", map[string]string{}, "GET, HEAD, OPTIONS, POST"},
		"/v1/templates/%7aap":          {"/v1/templates/{template}", map[string]string{"template": "zap"}, "DELETE, GET, HEAD, OPTIONS"},
		"/v1/templates/%2570":          {"/v1/templates/{template}", map[string]string{"template": "%70"}, "DELETE, GET, HEAD, OPTIONS"},
		"/v1/templates/a%2Fb":          {"/v1/templates/{template}", map[string]string{"template": "a/b"}, "DELETE, GET, HEAD, OPTIONS"},
		"/v1/templates/x@1/tags/y":     {"/v1/templates/{template}/tags/{tag}", map[string]string{"template": "x@1", "tag": "y"}, "DELETE, OPTIONS, PUT"},
		"/v1/sandboxes/x/exec/stream":  {"/v1/sandboxes/{sandbox_id}/exec/stream", map[string]string{"sandbox_id": "x"}, "GET, OPTIONS"},
		"/v1/auth/github/callback":     {"/v1/auth/github/callback", map[string]string{}, "GET, OPTIONS"},
		"/v1/templates/builds":         {"/v1/templates/builds", map[string]string{}, "GET, HEAD, OPTIONS, POST"},
		"/v1/templates/import":         {"/v1/templates/import", map[string]string{}, "OPTIONS, POST"},
		"/v1/templates/import/archive": {"/v1/templates/import/archive", map[string]string{}, "OPTIONS, POST"},
		"/v1/templates/builds/archives/sha256%3A" + strings.Repeat("0", 64): {
			"/v1/templates/builds/archives/{digest}", map[string]string{"digest": "sha256:" + strings.Repeat("0", 64)}, "OPTIONS, PUT",
		},
	} {
		m, ok := routes.find(path)
		if !ok || m.path != want.path || !maps.Equal(m.params, want.params) {
			t.Errorf("%s: %q %v, want %q %v", path, m.path, m.params, want.path, want.params)
			continue
		}
		if got := m.allow(); got != want.allow {
			t.Errorf("%s: Allow: %s, want %s", path, got, want.allow)
		}
	}
	for _, path := range []string{"", "/", "v1/sandboxes", "/v1/sandboxes/", "/v1//sandboxes", "/v1/sandboxes//exec", "/v1%2Fsandboxes", "/v1/nope"} {
		if m, ok := routes.find(path); ok {
			t.Errorf("%q is %s", path, m.path)
		}
	}
}

// TestRoutesAgree checks that for every operation the router that binds parameters finds
// the same operation as the document's router.
func TestRoutesAgree(t *testing.T) {
	a := newAPI(t)
	for path, item := range a.spec.Paths.Map() {
		for method := range item.Operations() {
			escaped := strings.NewReplacer("{", "%7b", "}", "%7D").Replace(path)
			m, ok := a.routes.find(escaped)
			if !ok || m.path != path {
				t.Fatalf("%s is %s", escaped, m.path)
			}
			if got := a.chi.Find(chi.NewRouteContext(), method, m.escaped()); got != path {
				t.Errorf("%s %s: %s", method, path, got)
			}
		}
	}
}

// TestRefusedBeforeAnything checks requests that the API refuses for everybody, with
// nothing behind it.
func TestRefusedBeforeAnything(t *testing.T) {
	h := newAPI(t).Handler()
	for _, tt := range []struct {
		name, method, target string
		header               http.Header
		status               int
		code                 string
	}{
		{"NUL in a path", "GET", "/v1/templates/a%00b", nil, 400, "invalid_argument"},
		{"no UTF-8 in a path", "DELETE", "/v1/templates/a%ffb", nil, 400, "invalid_argument"},
		{"NUL in a query", "GET", "/v1/audit?object=a%00", nil, 400, "invalid_argument"},
		{"no UTF-8 in a query", "GET", "/v1/audit?object=%c3%28", nil, 400, "invalid_argument"},
		{"no UTF-8 in a query's name", "GET", "/v1/audit?%ff=1", nil, 400, "invalid_argument"},
		{"malformed query", "GET", "/v1/audit?object=%zz", nil, 400, "invalid_argument"},
		{"no UTF-8 in a header", "POST", "/v1/sandboxes", http.Header{"Idempotency-Key": {"\xff"}}, 400, "invalid_argument"},
		{"no UTF-8 in a header of no parameter", "GET", "/v1/sandboxes", http.Header{"User-Agent": {"\xff"}}, 400, "invalid_argument"},
		{"no route", "GET", "/v2", nil, 404, "not_found"},
		{"HEAD of what only POST has", "HEAD", "/v1/templates/import", nil, 405, "method_not_allowed"},
		{"HEAD of a WebSocket", "HEAD", "/v1/sandboxes/x/exec/stream", nil, 405, "method_not_allowed"},
		{"DELETE of a word of the API", "DELETE", "/v1/templates/builds", nil, 405, "method_not_allowed"},
		{"a method of no standard", "FROB", "/v1/sandboxes", nil, 405, "method_not_allowed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, r := httptest.NewRecorder(), httptest.NewRequest(tt.method, tt.target, nil)
			for name, values := range tt.header {
				r.Header[name] = values
			}
			h.ServeHTTP(w, r)
			if w.Code != tt.status || !strings.Contains(w.Body.String(), `"code":"`+tt.code+`"`) || w.Header().Get("Content-Type") != "application/json" {
				t.Errorf("%d %s", w.Code, w.Body)
			}
			if (tt.status == 405) != (len(w.Header().Values("Allow")) == 1) {
				t.Errorf("Allow: %q", w.Header().Values("Allow"))
			}
		})
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("OPTIONS", "/v1/templates/x", nil))
	if w.Code != 204 || !slices.Equal(w.Header().Values("Allow"), []string{"DELETE, GET, HEAD, OPTIONS"}) {
		t.Errorf("OPTIONS: %d, Allow: %q", w.Code, w.Header().Values("Allow"))
	}
}
