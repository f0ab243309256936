package rest

import (
	"net/http"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
)

// documented reads the one operation of a document.
func documented(t *testing.T, yaml string) *openapi3.Operation {
	t.Helper()
	spec, err := openapi3.NewLoader().LoadFromData([]byte("openapi: 3.0.3\ninfo: {title: t, version: '1'}\npaths:\n  /x:\n    post: {operationId: x, " + yaml + "}\n"))
	if err != nil {
		t.Fatal(err)
	}
	return spec.Paths.Value("/x").Post
}

func TestParseProperties(t *testing.T) {
	const (
		json = "responses: {'200': {description: d, content: {application/json: {}}}}"
		text = "responses: {'200': {description: d, content: {text/plain: {}}}}"
		up   = "requestBody: {content: {application/x-tar: {}}}, responses: {'204': {description: d}}"
		ws   = "responses: {'101': {description: d}}"
	)
	for yaml, want := range map[string]properties{
		json:                                    {maxBody: maxBody, recorded: true},
		json + ", x-wrenn-access: {read: true}": {maxBody: maxBody},
		json + ", x-wrenn: {recorded: false}":   {maxBody: maxBody},
		json + ", x-wrenn: {lasts: true, max_body_mib: 16}":                           {maxBody: 16 << 20, lasts: true, recorded: true},
		text + ", x-wrenn: {lasts: false}":                                            {maxBody: maxBody, recorded: true},
		up + ", x-wrenn: {lasts: true}":                                               {maxBody: maxBody, lasts: true, recorded: true},
		ws + ", x-wrenn-access: {read: true}, x-wrenn: {lasts: true, recorded: true}": {maxBody: maxBody, lasts: true, recorded: true},
	} {
		if got, err := parseProperties(http.MethodPost, documented(t, yaml)); err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", yaml, got, err, want)
		}
	}
	for _, yaml := range []string{
		text, up, ws, up + ", x-wrenn: {lasts: false}", json + ", x-wrenn: {lasts: 1}", json + ", x-wrenn: {max_body_mib: 0}",
		json + ", x-wrenn: {max_body_mib: big}", json + ", x-wrenn: {other: true}", json + ", x-wrenn: yes",
	} {
		if got, err := parseProperties(http.MethodPost, documented(t, yaml)); err == nil {
			t.Errorf("%s: %+v", yaml, got)
		}
	}
	if got, err := parseProperties(http.MethodGet, documented(t, json)); err != nil || got.recorded {
		t.Errorf("GET: %+v, %v", got, err)
	}
}

// TestLastingOperations checks which operations last as long as their client wants. They are
// not in the latency histogram, where they would hide the server's own time.
func TestLastingOperations(t *testing.T) {
	spec, err := document()
	if err != nil {
		t.Fatal(err)
	}
	lasting := map[string]bool{"exec": true, "execStream": true, "runCode": true, "listContexts": true, "createContext": true, "deleteContext": true, "changeContext": true, "readFile": true, "writeFile": true, "readArchive": true, "writeArchive": true, "followBuild": true, "followBuildAdmin": true, "createSandbox": false, "pauseSandbox": false, "getDocs": false}
	found := 0
	for _, item := range spec.Paths.Map() {
		for _, op := range item.Operations() {
			p := propertiesOf(op)
			if want, listed := lasting[op.OperationID]; listed {
				found++
				if p.lasts != want {
					t.Errorf("%s lasts: %v", op.OperationID, p.lasts)
				}
			}
			if p.maxBody < maxBody {
				t.Errorf("%s has %+v", op.OperationID, p)
			}
		}
	}
	if found != len(lasting) {
		t.Errorf("the document has %d of %d operations", found, len(lasting))
	}
}
