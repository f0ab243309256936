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

	"github.com/spf13/cobra"
)

// TestHosts checks the requests and the output of the host commands.
func TestHosts(t *testing.T) {
	const registration = `{"host":{"id":"hst-1","name":"rack"},"token":"wrnh_secret","expires_at":"2030-01-01T00:00:00Z"}`
	var asked []string
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		asked = append(asked, strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+string(b)))
		if r.Header.Get("X-API-Key") != "k" {
			t.Errorf("key %q", r.Header.Get("X-API-Key"))
		}
		switch r.Method + " " + r.URL.Path {
		case "POST /v1/admin/hosts", "POST /v1/admin/hosts/hst-1/token":
			w.WriteHeader(http.StatusCreated)
			io.WriteString(w, registration)
		case "GET /v1/admin/hosts":
			io.WriteString(w, `{"hosts":[{"id":"hst-1","name":"rack","status":"online","cpus":4,"capacity_mib":8192,"vmm":"qemu","accelerator":"kvm","tags":["gpu","ssd"],"url":"https://192.0.2.1:7070","load":{"sandboxes":3,"used_memory_mib":1536,"used_vcpus":3},
				"problems":[{"kind":"firewall","message":"fi\u001bre","since":"2030-01-01T00:00:00Z"},{"kind":"cgroup","object":"a","message":"gone","since":"2030-01-01T00:00:00Z"},{"kind":"cgroup","object":"b","message":"gone","since":"2030-01-01T00:00:00Z"}]},
				{"id":"hst-2","name":"twin","status":"pending"},{"id":"hst-3","name":"twin","status":"pending"}]}`)
		case "GET /v1/admin/hosts/hst-1":
			io.WriteString(w, `{"id":"hst-1","name":"rack","loses":{"sandboxes":{"running":1,"paused":2},"templates":1}}`)
		case "GET /v1/admin/hosts/hst-2":
			io.WriteString(w, `{"id":"hst-2","name":"empty","loses":{"sandboxes":{},"templates":0}}`)
		case "PATCH /v1/admin/hosts/hst-1":
			io.WriteString(w, `{"id":"hst-1","name":"rack","status":"draining","tags":["gpu"]}`)
		case "POST /v1/sandboxes":
			io.WriteString(w, `{"id":"cl-1"}`)
		default:
			w.WriteHeader(http.StatusNoContent)
		}
	}))
	defer service.Close()
	const list, one = "GET /v1/admin/hosts", "/v1/admin/hosts/hst-1"
	for line, want := range map[string]struct {
		code  int
		out   string
		asked []string
	}{
		"host add rack":                        {0, "wrenn agent --server URL --token wrnh_secret", []string{`POST /v1/admin/hosts {"name":"rack"}`}},
		"host add rack --tag gpu --tag ssd":    {0, "hst-1\n", []string{`POST /v1/admin/hosts {"name":"rack","tags":["gpu","ssd"]}`}},
		"host add rack -o json":                {0, `"token": "wrnh_secret"`, []string{`POST /v1/admin/hosts {"name":"rack"}`}},
		"host ls":                              {0, "hst-1  rack  online   3          1536/8192 MiB  3/4   qemu kvm  gpu,ssd  https://192.0.2.1:7070  cgroup,firewall\n", []string{list}},
		"host token hst-1":                     {0, "wrnh_secret", []string{"POST " + one + "/token"}},
		"host drain hst-1":                     {0, "hst-1  rack  draining  gpu\n", []string{"PATCH " + one + ` {"draining":true}`}},
		"host undrain rack":                    {0, "", []string{list, "PATCH " + one + ` {"draining":false}`}},
		"host tag rack gpu":                    {0, "", []string{list, "PATCH " + one + ` {"tags":["gpu"]}`}},
		"host tag hst-1":                       {0, "", []string{"PATCH " + one + ` {"tags":[]}`}},
		"host rm hst-1":                        {ExitFailure, "", []string{"GET " + one + "?preview=true"}},
		"host rm --force rack":                 {0, "", []string{list, "GET " + one + "?preview=true", "DELETE " + one + "?force=true"}},
		"host rm hst-2":                        {0, "", []string{"GET /v1/admin/hosts/hst-2?preview=true", "DELETE /v1/admin/hosts/hst-2?force=false"}},
		"host drain twin":                      {ExitFailure, "", []string{list}},
		"host drain nobody":                    {ExitFailure, "", []string{list}},
		"host add":                             {ExitUsage, "", nil},
		"host add rack -o xml":                 {ExitUsage, "", nil},
		"create --host-tag gpu --host-tag ssd": {0, "", []string{`POST /v1/sandboxes {"timeout_seconds":300,"on_timeout":"destroy","host_tags":["gpu","ssd"]}`}},
	} {
		t.Run(line, func(t *testing.T) {
			asked = nil
			var out, said bytes.Buffer
			wrenn := command(&out, &said, append(strings.Fields(line), "--url", service.URL, "--api-key", "k")...)
			wrenn.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &UsageError{err} })
			err := wrenn.ExecuteContext(context.Background())
			if code := ExitCode(err); code != want.code {
				t.Errorf("exit code %d (%v), want %d", code, err, want.code)
			}
			if !strings.Contains(out.String(), want.out) {
				t.Errorf("printed %q, want %q in it", out.String(), want.out)
			}
			if !slices.Equal(asked, want.asked) {
				t.Errorf("requests %q, want %q", asked, want.asked)
			}
			if line == "host ls" && (!strings.Contains(said.String(), "rack: fi?re (since ") || strings.Count(said.String(), "\n") != 3) {
				t.Errorf("the problems' output: %q", said.String())
			}
			if line == "host rm hst-1" && !strings.Contains(err.Error(), "2 paused sandboxes, 1 running sandbox, 1 template that") {
				t.Errorf("preview: %v", err)
			}
		})
	}
}
