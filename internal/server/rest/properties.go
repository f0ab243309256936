package rest

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/getkin/kin-openapi/openapi3"
)

// propertiesField is the document's field of an operation for its [properties].
const propertiesField = "x-wrenn"

// properties say how an operation is served. Nothing but the document lists them.
type properties struct {
	// lasts: the client or the guest determines the duration. The caller's access is
	// checked throughout, and the histogram of durations leaves the operation out.
	lasts bool
	// maxBody limits a JSON body, in bytes.
	maxBody int64
	// recorded: the audit log has it. By default, operations that change something are
	// recorded.
	recorded bool
}

func propertiesOf(op *openapi3.Operation) properties {
	p, _ := op.Extensions[propertiesField].(properties)
	return p
}

// readProperties replaces the extension of every operation with the parsed properties.
func readProperties(spec *openapi3.T) error {
	var errs []error
	for path, item := range spec.Paths.Map() {
		for method, op := range item.Operations() {
			p, err := parseProperties(method, op)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s %s: %s: %w", method, path, propertiesField, err))
			}
			if op.Extensions == nil {
				op.Extensions = make(map[string]any)
			}
			op.Extensions[propertiesField] = p
		}
	}
	return errors.Join(errs...)
}

func parseProperties(method string, op *openapi3.Operation) (properties, error) {
	p := properties{maxBody: maxBody, recorded: method != http.MethodGet}
	if access, ok := op.Extensions["x-wrenn-access"].(map[string]any); ok {
		if read, says := access["read"].(bool); says {
			p.recorded = !read
		}
	}
	said, ok := op.Extensions[propertiesField].(map[string]any)
	if !ok && op.Extensions[propertiesField] != nil {
		return p, errors.New("want {lasts: true|false, max_body_mib: N, recorded: true|false}")
	}
	for name, v := range said {
		ok := false
		switch name {
		case "lasts":
			p.lasts, ok = v.(bool)
		case "recorded":
			p.recorded, ok = v.(bool)
		case "max_body_mib":
			var mib float64
			mib, ok = v.(float64)
			p.maxBody = int64(mib) << 20
			ok = ok && mib >= 1
		}
		if !ok {
			return p, fmt.Errorf("%s: %v is unknown, or not a value", name, v)
		}
	}
	if _, says := said["lasts"]; !says && mayLast(op) {
		return p, errors.New("lasts: its body or its answer is not JSON, so the document must say whether it lasts")
	}
	if streams(op) && !p.lasts {
		return p, errors.New("lasts: a body that is passed on as it comes lasts")
	}
	return p, nil
}

// mayLast reports whether the body or a successful response can be other than JSON.
func mayLast(op *openapi3.Operation) bool {
	return answersStream(op) || streams(op)
}
