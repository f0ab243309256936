// Package apitest checks in tests that every response of the REST API conforms to the
// OpenAPI document.
package apitest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"regexp"
	"strings"
	"sync"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"

	"github.com/wrenn-dev/wrenn/api"
)

// raw reports whether an operation's successful responses can be other than JSON. Only the
// status, the headers and the content type of those are checked.
func raw(op *openapi3.Operation) bool {
	for status, r := range op.Responses.Map() {
		if status == "101" {
			return true
		}
		for kind := range r.Value.Content {
			if status[0] == '2' && kind != "application/json" {
				return true
			}
		}
	}
	return false
}

// Document is the API's OpenAPI document, made strict: a response must not have fields
// that are not in the document.
type Document struct {
	spec   *openapi3.T
	router routers.Router
	fault  *openapi3.Schema
}

// Load returns the document. Many tests can share it.
func Load() (*Document, error) { return load() }

var load = sync.OnceValues(func() (*Document, error) {
	spec, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		return nil, fmt.Errorf("read OpenAPI document: %w", err)
	}
	// As the server does, and for its reasons.
	spec.OpenAPI, spec.Webhooks = "3.0.3", nil
	for _, s := range spec.Components.Schemas {
		seal(s)
	}
	d := &Document{spec: spec, fault: spec.Components.Schemas["Error"].Value}
	if d.router, err = gorillamux.NewRouter(spec); err != nil {
		return nil, fmt.Errorf("read OpenAPI document: %w", err)
	}
	return d, nil
})

// seal makes an object's schema forbid fields that it does not name.
func seal(s *openapi3.SchemaRef) {
	if s == nil || s.Value == nil {
		return
	}
	v := s.Value
	if len(v.Properties) > 0 && v.AdditionalProperties.Has == nil && v.AdditionalProperties.Schema == nil {
		no := false
		v.AdditionalProperties.Has = &no
	}
	if s.Ref != "" {
		return // The schema that it refers to is sealed itself.
	}
	for _, p := range v.Properties {
		seal(p)
	}
	seal(v.Items)
	seal(v.AdditionalProperties.Schema)
}

// sandboxHost matches the host name of a sandbox's port, whose responses come from the
// sandbox.
var sandboxHost = regexp.MustCompile(`^[0-9]+-cl-[0-9a-z]*\.`)

// Check returns an error that says how a response does not conform to the document.
func (d *Document) Check(req *http.Request, status int, header http.Header, body []byte) error {
	asked := req
	if req.Method == http.MethodHead {
		asked = req.WithContext(req.Context())
		asked.Method = http.MethodGet
	}
	route, params, err := d.router.FindRoute(asked)
	if req.Method == http.MethodOptions && status == http.StatusNoContent {
		return checkOptions(header, body)
	}
	if err != nil {
		return d.checkNoRoute(status, header, body)
	}
	if header.Get("X-Request-Id") == "" {
		return errors.New("no X-Request-Id")
	}
	kind, _, _ := mime.ParseMediaType(header.Get("Content-Type"))
	isJSON := kind == "application/json"
	if req.Method == http.MethodHead {
		if len(body) > 0 {
			return errors.New("a body for HEAD")
		}
		isJSON = false // There is no body to check.
	}
	if !isJSON && len(body) > 0 && (!raw(route.Operation) || status >= 400) {
		return fmt.Errorf("a body of the type %q", header.Get("Content-Type"))
	}
	if route.Operation.Responses.Status(status) == nil {
		return fmt.Errorf("the operation does not say that it may answer %d", status)
	}
	return openapi3filter.ValidateResponse(context.Background(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: req, PathParams: params, Route: route},
		Status:                 status, Header: header, Body: io.NopCloser(bytes.NewReader(body)),
		Options: &openapi3filter.Options{IncludeResponseStatus: true, ExcludeResponseBody: !isJSON},
	})
}

// checkOptions checks the response to OPTIONS, which every path supports.
func checkOptions(header http.Header, body []byte) error {
	if header.Get("Allow") == "" || len(body) > 0 {
		return fmt.Errorf("OPTIONS: Allow %q and a body of %d bytes", header.Get("Allow"), len(body))
	}
	return nil
}

// checkNoRoute checks the response to a request for which there is no operation.
func (d *Document) checkNoRoute(status int, header http.Header, body []byte) error {
	if status != http.StatusNotFound && status != http.StatusMethodNotAllowed {
		return fmt.Errorf("%d where there is no operation", status)
	}
	if kind := header.Get("Content-Type"); kind != "application/json" {
		return fmt.Errorf("%d as %q", status, kind)
	}
	var v any
	if err := json.Unmarshal(body, &v); err != nil {
		return err
	}
	return d.fault.VisitJSON(v)
}

// Transport returns a transport that sends requests through next, and calls report for
// each response that does not conform to the document. It does not check requests to
// sandboxes' ports. It reads JSON bodies completely before it returns the response.
func (d *Document) Transport(next http.RoundTripper, report func(error)) http.RoundTripper {
	return transport{d, next, report}
}

type transport struct {
	document *Document
	next     http.RoundTripper
	report   func(error)
}

func (t transport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.next.RoundTrip(req)
	host := req.Host
	if host == "" {
		host = req.URL.Host
	}
	if err != nil || sandboxHost.MatchString(host) {
		return resp, err
	}
	var body []byte
	if strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") {
		body, err = io.ReadAll(resp.Body)
		if err != nil {
			return nil, errors.Join(err, resp.Body.Close())
		}
		if err := resp.Body.Close(); err != nil {
			return nil, err
		}
		resp.Body = io.NopCloser(bytes.NewReader(body))
	}
	if resp.StatusCode == http.StatusBadGateway && bytes.Contains(body, []byte(`"code":"unavailable"`)) {
		return resp, nil // from the front door, which the control plane did not answer
	}
	if err := t.document.Check(req, resp.StatusCode, resp.Header, body); err != nil {
		t.report(fmt.Errorf("%s %s: answer %d is not in the OpenAPI document: %w", req.Method, req.URL.Path, resp.StatusCode, err))
	}
	return resp, nil
}
