package rest

import (
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/go-chi/chi/v5"

	"github.com/wrenn-dev/wrenn/api"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/metrics"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

func newAPI(t *testing.T) *API {
	t.Helper()
	a, err := New(Config{PublicURL: "http://localhost:8000", Domain: "localhost", InFlight: budget.NewInFlight(64), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestRoutes checks that the router and the document have the same routes.
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

// TestDocumented checks that the document has everything required of each route.
func TestDocumented(t *testing.T) {
	a := newAPI(t)
	summaries := map[string]string{}
	for path, item := range a.spec.Paths.Map() {
		for method, op := range item.Operations() {
			if other := summaries[op.Summary]; other != "" {
				t.Errorf("%s and %s have the same summary: %s", op.OperationID, other, op.Summary)
			}
			summaries[op.Summary] = op.OperationID
			open := a.access[op].Role == auth.Anybody
			if open != (!strings.HasPrefix(path, "/v1/") || strings.HasPrefix(path, "/v1/hosts/") || op.Tags[0] == "login") {
				t.Errorf("%s %s: open = %v", method, path, open)
			}
			for _, status := range must(method, path, op, a.access[op]) {
				if op.Responses.Status(status) == nil {
					t.Errorf("%s %s: lacks the response %d", method, path, status)
				}
			}
			if op.Summary == "" || op.OperationID == "" || len(op.Tags) != 1 {
				t.Errorf("%s %s: needs a summary, an id and a tag", method, path)
			}
			if open && op.Responses.Status(429) == nil {
				t.Errorf("%s %s: does not document its rate limit", method, path)
			}
			for _, p := range append(slices.Clone(item.Parameters), op.Parameters...) {
				if p.Value.Description == "" {
					t.Errorf("%s %s: parameter %s has no description", method, path, p.Value.Name)
				}
			}
		}
	}
}

// must returns the errors that any part of the API may return for a route.
func must(method, path string, op *openapi3.Operation, access auth.Access) []int {
	all := []int{400}
	if access.Role != auth.Anybody {
		all = append(all, 401, 403)
	}
	if method != http.MethodGet {
		all = append(all, 403) // For another site's page.
	}
	if access.Role.OfTeam() || strings.Contains(path, "{") {
		all = append(all, 404)
	}
	if bodySchema(op) != nil {
		all = append(all, 413)
	}
	if strings.HasPrefix(path, "/v1/") {
		all = append(all, 500, 503, 504)
	}
	if strings.Contains(path, "{sandbox_id}") {
		all = append(all, 409, 501, 502)
	}
	return all
}

// TestComponents checks that an operation refers to every component of the document.
func TestComponents(t *testing.T) {
	document := string(api.OpenAPI)
	spec := newAPI(t).spec
	for kind, names := range map[string][]string{
		"schemas":    slices.Collect(maps.Keys(spec.Components.Schemas)),
		"responses":  slices.Collect(maps.Keys(spec.Components.Responses)),
		"parameters": slices.Collect(maps.Keys(spec.Components.Parameters)),
		"headers":    slices.Collect(maps.Keys(spec.Components.Headers)),
	} {
		if len(names) == 0 {
			t.Errorf("no %s", kind)
		}
		for _, name := range names {
			if !strings.Contains(document, `"#/components/`+kind+"/"+name+`"`) {
				t.Errorf("nothing refers to %s/%s", kind, name)
			}
		}
	}
	for name := range spec.Components.SecuritySchemes {
		if !strings.Contains(document, "- "+name+": []") {
			t.Errorf("nothing is secured by %s", name)
		}
	}
}

// TestReserved checks that the names that the API's paths use are those that the document
// reserves for templates.
func TestReserved(t *testing.T) {
	a := newAPI(t)
	var taken []string
	for path := range a.spec.Paths.Map() {
		if name, ok := strings.CutPrefix(path, "/v1/templates/"); ok && !strings.ContainsAny(name, "{/") {
			taken = append(taken, name)
		}
	}
	slices.Sort(taken)
	var says []string
	for _, name := range a.spec.Components.Schemas["TemplateName"].Value.Not.Value.Enum {
		says = append(says, name.(string))
	}
	if !slices.Equal(taken, says) || len(taken) == 0 {
		t.Errorf("the document reserves %q, paths have %q", says, taken)
	}
	for _, name := range taken {
		if err := templates.CheckName(name); !fault.Is(err, fault.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
		body := []byte(`{"name":"` + name + `","sandbox_id":"cl-0000000000000000000000000"}`)
		if _, err := conform(bodySchema(operation(t, a, "createSnapshot")), body, budget.New(1<<30).Reserve("")); err == nil {
			t.Errorf("the document accepts %s", body)
		}
	}
}

// TestDefaults checks that the document's defaults are the server's.
func TestDefaults(t *testing.T) {
	a := newAPI(t)
	field := func(op, name string) any { return bodySchema(operation(t, a, op)).Properties[name].Value.Default }
	for _, tt := range []struct {
		name     string
		says, is any
	}{
		{"template", field("createSandbox", "template"), defaultTemplate},
		{"timeout", field("createSandbox", "timeout_seconds"), defaultTimeout},
		{"exec timeout", field("exec", "timeout_seconds"), defaultExecTimeout},
		{"code timeout", field("runCode", "timeout_seconds"), defaultCodeTimeout},
		{"code context", field("runCode", "context_id"), defaultContext},
		{"limit", a.spec.Components.Parameters["Limit"].Value.Schema.Value.Default, defaultLimit},
		{"window", a.spec.Components.Schemas["MetricsWindow"].Value.Default, metrics.Windows[0].Name},
		{"copies", field("forkSandbox", "count"), 1},
	} {
		if fmt.Sprint(tt.says) != fmt.Sprint(tt.is) {
			t.Errorf("%s: the document says %v, the server uses %v", tt.name, tt.says, tt.is)
		}
	}
	// Every other default of a body or parameter must be Go's zero value.
	for path, item := range a.spec.Paths.Map() {
		for method, op := range item.Operations() {
			for _, p := range append(slices.Clone(item.Parameters), op.Parameters...) {
				if d := p.Value.Schema.Value.Default; p.Value.Schema.Ref == "" && p.Ref == "" && d != nil && d != false {
					t.Errorf("%s %s: no test checks the default of %s", method, path, p.Value.Name)
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
