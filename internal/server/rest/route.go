package rest

import (
	"cmp"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/go-chi/chi/v5"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// pathTemplate is a path of the document, split into segments.
type pathTemplate struct {
	path     string
	segments []string
	item     *openapi3.PathItem
	ops      map[string]*openapi3.Operation
}

// param returns the parameter's name if a segment is one.
func param(segment string) (name string, ok bool) {
	name, ok = strings.CutPrefix(segment, "{")
	return strings.TrimSuffix(name, "}"), ok
}

// router finds the path template for a request's path. As OpenAPI requires, a path
// without parameters takes precedence, whatever the method.
type router struct {
	// byLength has the templates by their number of segments, more specific ones first.
	byLength map[int][]*pathTemplate
}

func newRouter(spec *openapi3.T) router {
	r := router{make(map[int][]*pathTemplate)}
	for path, item := range spec.Paths.Map() {
		t := &pathTemplate{path: path, segments: strings.Split(path, "/"), item: item, ops: item.Operations()}
		r.byLength[len(t.segments)] = append(r.byLength[len(t.segments)], t)
	}
	for _, all := range r.byLength {
		slices.SortFunc(all, func(a, b *pathTemplate) int {
			return slices.CompareFunc(a.segments, b.segments, func(x, y string) int {
				_, xIs := param(x)
				_, yIs := param(y)
				if xIs != yIs {
					return map[bool]int{false: -1, true: 1}[xIs]
				}
				return cmp.Compare(x, y)
			})
		})
	}
	return r
}

// match is the result of routing a request.
type match struct {
	*pathTemplate
	// params has the path's unescaped parameters.
	params map[string]string
	// op is the called operation (nil: none). method is its method in the document: GET
	// for HEAD.
	op     *openapi3.Operation
	method string
}

// find returns the match of an escaped path. It unescapes every segment exactly once,
// before comparing.
func (r router) find(escaped string) (match, bool) {
	segments := strings.Split(escaped, "/")
	for i, s := range segments {
		text, err := url.PathUnescape(s)
		if err != nil {
			return match{}, false
		}
		segments[i] = text
	}
	for _, t := range r.byLength[len(segments)] {
		if params, ok := t.match(segments); ok {
			return match{pathTemplate: t, params: params}, true
		}
	}
	return match{}, false
}

func (t *pathTemplate) match(segments []string) (map[string]string, bool) {
	params := make(map[string]string)
	for i, want := range t.segments {
		name, ok := param(want)
		switch {
		case ok && segments[i] != "":
			params[name] = segments[i]
		case ok || want != segments[i]:
			return nil, false
		}
	}
	return params, true
}

// escaped returns the matched path in canonical form.
func (m match) escaped() string {
	segments := slices.Clone(m.segments)
	for i, s := range segments {
		if name, ok := param(s); ok {
			segments[i] = url.PathEscape(m.params[name])
		}
	}
	return strings.Join(segments, "/")
}

// call returns m with the operation of a method. HEAD calls GET's operation if that only
// reads.
func (m match) call(method string) match {
	if method == http.MethodHead {
		m = m.call(http.MethodGet)
		if m.op != nil && propertiesOf(m.op).recorded {
			m.op = nil
		}
		return m
	}
	m.op, m.method = m.ops[method], method
	return m
}

// allow lists the methods that the path has.
func (m match) allow() string {
	all := append(slices.Collect(maps.Keys(m.ops)), http.MethodOptions)
	if m.call(http.MethodHead).op != nil {
		all = append(all, http.MethodHead)
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// route finds the operation of a request. It refuses parameters and headers that are not
// text before anything uses them.
func (a *API) route(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m, ok := a.routes.find(r.URL.EscapedPath())
		if !ok {
			a.Fail(w, r, fault.New(fault.NotFound, "no such route"))
			return
		}
		if r.Method == http.MethodOptions {
			w.Header().Set("Allow", m.allow())
			w.WriteHeader(http.StatusNoContent)
			return
		}
		if m = m.call(r.Method); m.op == nil {
			w.Header().Set("Allow", m.allow())
			a.Fail(w, r, fault.New(fault.MethodNotAllowed, "%s is not allowed here", r.Method))
			return
		}
		o := observed(r)
		o.match = m
		if err := checkText(r, m.params); err != nil {
			a.Fail(w, r, err)
			return
		}
		rc := chi.RouteContext(r.Context())
		rc.RoutePath, rc.RouteMethod = m.escaped(), m.method
		next.ServeHTTP(w, r)
	})
}

// routed returns the path and operation that a request matched.
func routed(r *http.Request) match {
	if o := observed(r); o != nil {
		return o.match
	}
	return match{}
}
