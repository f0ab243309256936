package cli

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
)

// TestPauseForkSnapshot checks the requests and the output of pause, resume, fork and snapshot.
func TestPauseForkSnapshot(t *testing.T) {
	var asked []string
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		asked = append(asked, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+string(b)))
		switch {
		case strings.Contains(r.URL.Path, "bad"):
			w.WriteHeader(http.StatusConflict)
			io.WriteString(w, `{"error":{"code":"conflict","message":"the sandbox is stopped"}}`)
		case strings.HasSuffix(r.URL.Path, "/fork"):
			io.WriteString(w, `{"sandboxes":[{"id":"cl-2"},{"id":"cl-3"}]}`)
		case r.URL.Path == "/v1/snapshots" && r.Method == http.MethodGet:
			io.WriteString(w, `{"snapshots":[{"id":"tpl-1","name":"snap","version":1,"tags":["latest"],"size_bytes":1048576}]}`)
		case r.Method == http.MethodPut:
			io.WriteString(w, `{"id":"tpl-1","name":"snap","version":1,"tags":["latest","stable"]}`)
		case strings.HasSuffix(r.URL.Path, "/tokens/revoke"):
			io.WriteString(w, `{"id":"cl-1","access_token":"1.new"}`)
		case r.URL.Path == "/v1/snapshots":
			io.WriteString(w, `{"id":"tpl-1","name":"snap"}`)
		case r.Method == http.MethodGet:
			io.WriteString(w, `{"id":"cl-1","url":"https://{port}-cl-1.sandboxes.example.net"}`)
		default:
			io.WriteString(w, `{"id":"cl-1"}`)
		}
	}))
	defer service.Close()
	const create = `POST /v1/sandboxes {"timeout_seconds":300,`
	for line, want := range map[string]struct {
		code  int
		out   string
		asked []string
	}{
		"pause cl-1":                           {0, "cl-1\n", []string{"POST /v1/sandboxes/cl-1/pause"}},
		"pause cl-1 bad cl-2":                  {ExitFailure, "cl-1\ncl-2\n", []string{"POST /v1/sandboxes/cl-1/pause", "POST /v1/sandboxes/bad/pause", "POST /v1/sandboxes/cl-2/pause"}},
		"resume cl-1":                          {0, "cl-1\n", []string{"POST /v1/sandboxes/cl-1/resume"}},
		"url cl-1 80":                          {0, "https://80-cl-1.sandboxes.example.net/\n", []string{"GET /v1/sandboxes/cl-1"}},
		"url cl-1 0":                           {ExitUsage, "", nil},
		"url bad 80":                           {ExitFailure, "", []string{"GET /v1/sandboxes/bad"}},
		"revoke cl-1":                          {0, "cl-1\n", []string{"POST /v1/sandboxes/cl-1/tokens/revoke"}},
		"revoke bad":                           {ExitFailure, "", []string{"POST /v1/sandboxes/bad/tokens/revoke"}},
		"revoke":                               {ExitUsage, "", nil},
		"fork cl-1":                            {0, "cl-2\ncl-3\n", []string{`POST /v1/sandboxes/cl-1/fork {"count":1}`}},
		"fork -n 2 cl-1":                       {0, "cl-2\ncl-3\n", []string{`POST /v1/sandboxes/cl-1/fork {"count":2}`}},
		"snapshot create cl-1 snap":            {0, "snap\n", []string{`POST /v1/snapshots {"sandbox_id":"cl-1","name":"snap"}`}},
		"snapshot ls":                          {0, "NAME  VERSION  TAGS    ID     SIZE   CREATED\nsnap  1        latest  tpl-1  1 MiB  0001-01-01 00:00:00\n", []string{"GET /v1/snapshots"}},
		"template rm snap other@2":             {0, "snap\nother@2\n", []string{"DELETE /v1/templates/snap", "DELETE /v1/templates/other@2"}},
		"template tag snap@1 stable":           {0, "snap:stable is version 1\n", []string{"PUT /v1/templates/snap@1/tags/stable"}},
		"template untag snap:stable":           {0, "snap:stable\n", []string{"DELETE /v1/templates/snap/tags/stable"}},
		"template untag snap":                  {ExitUsage, "", nil},
		"snapshot rm snap other":               {0, "snap\nother\n", []string{"DELETE /v1/snapshots/snap", "DELETE /v1/snapshots/other"}},
		"create":                               {0, "cl-1\n", []string{create + `"on_timeout":"destroy"}`}},
		"create --on-timeout pause":            {0, "cl-1\n", []string{create + `"on_timeout":"pause"}`}},
		"create --auto-resume":                 {0, "cl-1\n", []string{create + `"on_timeout":"destroy","auto_resume":true}`}},
		"create --auto-resume=false":           {0, "cl-1\n", []string{create + `"on_timeout":"destroy","auto_resume":false}`}},
		"create --on-timeout sleep":            {ExitUsage, "", nil},
		"run --on-timeout sleep -- true":       {ExitUsage, "", nil},
		"fork -n 0 cl-1":                       {ExitUsage, "", nil},
		"pause":                                {ExitUsage, "", nil},
		"snapshot create cl-1":                 {ExitUsage, "", nil},
		"snapshot rm":                          {ExitUsage, "", nil},
		"snapshot ls -o yaml":                  {ExitUsage, "", nil},
		"fork -o yaml cl-1":                    {ExitUsage, "", nil},
		"snapshot create -o yaml cl-1 snapped": {ExitUsage, "", nil},
	} {
		asked = nil
		var out bytes.Buffer
		words := strings.Fields(line)
		err := command(&out, io.Discard, slices.Concat(words[:1], []string{"--url", service.URL, "--api-key", "key"}, words[1:])...).ExecuteContext(context.Background())
		if ExitCode(err) != want.code || out.String() != want.out || !slices.Equal(asked, want.asked) {
			t.Errorf("%s: %q, exit code %d (%v), requests %q", line, out.String(), ExitCode(err), err, asked)
		}
	}
}
