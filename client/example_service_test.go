package client_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/wrenn-dev/wrenn/client"
)

// testService gives the examples' clients canned responses instead of a service.
var testService = client.WithHTTPClient(&http.Client{Transport: answers{
	"POST /v1/sandboxes":           `{"id":"cl-1","state":"running"}`,
	"POST /v1/sandboxes/cl-1/exec": `{"stdout":"42\n","exit_code":0}`,
	"DELETE /v1/sandboxes/cl-1":    "",
	"GET /v1/sandboxes":            `{"sandboxes":[{"id":"cl-1","state":"running"},{"id":"cl-2","state":"paused"}]}`,
	"POST /v1/sandboxes/cl-1/fork": `{"sandboxes":[{"id":"cl-3","forked_from":"cl-1"},{"id":"cl-4","forked_from":"cl-1"}]}`,
}})

// answers maps method and path to response bodies. Any other request gets 404.
type answers map[string]string

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) {
	body, ok := a[r.Method+" "+r.URL.Path]
	status := http.StatusOK
	switch {
	case !ok:
		status, body = http.StatusNotFound, `{"error":{"code":"not_found","message":"no such sandbox"}}`
	case body == "":
		status = http.StatusNoContent
	}
	return &http.Response{
		StatusCode: status, Status: fmt.Sprint(status), Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(strings.NewReader(body)), ContentLength: int64(len(body)), Request: r,
	}, nil
}
