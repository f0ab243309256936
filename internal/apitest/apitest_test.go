package apitest

import (
	"net/http"
	"strings"
	"testing"
)

// TestCheck checks that responses that do not conform to the document are found.
func TestCheck(t *testing.T) {
	d, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	const failed = `{"error":{"code":"not_found","message":"no"}}`
	for name, a := range map[string]struct {
		what   string
		status int
		kind   string
		body   string
		ok     bool
	}{
		"list":                    {"GET /v1/sandboxes", 200, "application/json", `{"sandboxes":[]}`, true},
		"a field that is not its": {"GET /v1/sandboxes", 200, "application/json", `{"sandboxes":[],"more":1}`, false},
		"nested":                  {"GET /v1/sandboxes", 404, "application/json", `{"error":{"code":"c","message":"m","detail":"d"}}`, false},
		"a field of another type": {"GET /v1/sandboxes", 200, "application/json", `{"sandboxes":{}}`, false},
		"a field that is missing": {"GET /v1/sandboxes", 200, "application/json", `{}`, false},
		"a status that is not":    {"GET /v1/sandboxes", 202, "application/json", `{"sandboxes":[]}`, false},
		"an error":                {"GET /v1/sandboxes", 500, "application/json", failed, true},
		"a page":                  {"GET /v1/sandboxes", 502, "text/html", "<p>", false},
		"a body that is a file's": {"GET /v1/sandboxes/cl-0a1b2c3d4e5f6g7h8i9j0k1l2/files?path=/x", 200, "application/octet-stream", "x", true},
		"no file":                 {"GET /v1/sandboxes/cl-0a1b2c3d4e5f6g7h8i9j0k1l2/files?path=/x", 404, "text/plain", "x", false},
		"not JSON":                {"GET /v1/sandboxes", 200, "application/json", `{"sandboxes":[]`, false},
		"no route":                {"GET /v1/nothing", 404, "application/json", failed, true},
		"no route, but an answer": {"GET /v1/nothing", 200, "application/json", `{}`, false},
		"no such method":          {"PATCH /v1/sandboxes", 405, "application/json", failed, true},
		"a route that is no JSON": {"GET /v1/nothing", 404, "text/plain", "no", false},
	} {
		method, path, _ := strings.Cut(a.what, " ")
		req, err := http.NewRequest(method, "http://localhost"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = d.Check(req, a.status, http.Header{"Content-Type": {a.kind}, "X-Request-Id": {"r"}}, []byte(a.body))
		if (err == nil) != a.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRaw checks which responses need not be JSON.
func TestRaw(t *testing.T) {
	d, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	if d.fault == nil {
		t.Fatal("no schema of errors")
	}
	want := map[string]bool{"execStream": true, "readFile": true, "runCode": true, "getDocs": true, "exec": false, "createSandbox": false}
	found := 0
	for _, item := range d.spec.Paths.Map() {
		for _, op := range item.Operations() {
			is, listed := want[op.OperationID]
			if !listed {
				continue
			}
			if found++; raw(op) != is {
				t.Errorf("%s is raw: %v", op.OperationID, raw(op))
			}
		}
	}
	if found != len(want) {
		t.Errorf("%d of %d operations are in the document", found, len(want))
	}
}
