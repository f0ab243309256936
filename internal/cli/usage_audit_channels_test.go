package cli

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestUsageAuditChannels checks the requests and the output of the commands for usage, audit log and
// channels, against a service with documented responses.
func TestUsageAuditChannels(t *testing.T) {
	var asked []string
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.URL.String())
		w.Header().Set("Content-Type", "application/json")
		switch r.URL.Path {
		case "/v1/usage":
			_, _ = w.Write([]byte(`{"from":"2026-01-01","to":"2026-01-02","days":[{"day":"2026-01-01","amount":{"vcpu_seconds":1.5,"memory_gib_seconds":3,"sandbox_starts":2}}],"total":{"vcpu_seconds":1.5,"memory_gib_seconds":3,"sandbox_starts":2}}`))
		case "/v1/audit":
			_, _ = w.Write([]byte(`{"records":[{"at":"2026-01-01T00:00:00Z","actor":"key-1","action":"exec","object_kind":"sandbox","object":"cl-\u001b[31m","result":"ok","code":""}]}`))
		default:
			_, _ = w.Write([]byte(`{"id":"chn-1","state":"failed","error":"answered 500"}`))
		}
	}))
	defer web.Close()
	t.Setenv("WRENN_URL", web.URL)
	t.Setenv("WRENN_API_KEY", "wrn_x")
	run := func(args ...string) (string, string, error) {
		var out, errw bytes.Buffer
		for _, c := range Commands(strings.NewReader(""), &out, &errw) {
			if c.Name() == args[0] {
				c.SetArgs(args[1:])
				c.SetOut(&errw)
				c.SetErr(&errw)
				err := c.ExecuteContext(t.Context())
				return out.String(), errw.String(), err
			}
		}
		t.Fatalf("no command %s", args[0])
		return "", "", nil
	}
	if out, _, err := run("usage", "--from", "2026-01-01"); err != nil || !strings.Contains(out, "2026-01-01  1.5           3.0          2") {
		t.Errorf("usage: %q, %v", out, err)
	}
	if out, _, err := run("audit", "--result", "ok"); err != nil || !strings.Contains(out, "exec") || strings.Contains(out, "\x1b") {
		t.Errorf("audit: %q, %v", out, err)
	}
	if out, errw, err := run("channel", "add", "--event", "sandbox.lost", "n", "webhook", "https://example.com"); err != nil || out != "chn-1\n" || !strings.HasPrefix(errw, "secret: ") {
		t.Errorf("channel add: %q, %q, %v", out, errw, err)
	}
	if _, _, err := run("channel", "test", "chn-1"); err == nil {
		t.Error("a failed channel test has exit code 0")
	}
	for _, bad := range [][]string{{"usage", "--from", "x"}, {"channel", "add", "n", "webhook", "u"}, {"channel", "add", "--event", "e", "n", "pigeon", "u"}} {
		if _, _, err := run(bad...); ExitCode(err) != ExitUsage {
			t.Errorf("%v: %v", bad, err)
		}
	}
	want := []string{"GET /v1/usage?from=2026-01-01", "GET /v1/audit?result=ok", "POST /v1/channels", "POST /v1/channels/chn-1/test"}
	if strings.Join(asked, "\n") != strings.Join(want, "\n") {
		t.Errorf("requests %q", asked)
	}
}
