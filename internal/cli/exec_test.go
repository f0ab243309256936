package cli

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestExecRefused checks that a command that cannot run yields the exit code that shells
// give, and that its reason is not mixed with the command's own output.
func TestExecRefused(t *testing.T) {
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		code := strings.Split(r.URL.Path, "/")[3]
		w.WriteHeader(http.StatusUnprocessableEntity)
		fmt.Fprintf(w, `{"error":{"code":%q,"message":"x: the reason"}}`, code)
	}))
	defer service.Close()
	for code, want := range map[string]int{"command_not_found": 127, "command_not_executable": 126, "not_found": ExitFailure} {
		err := command(io.Discard, io.Discard, "exec", "--url", service.URL, "--api-key", "key", code, "x").ExecuteContext(t.Context())
		if ExitCode(err) != want || err == nil || !strings.HasSuffix(err.Error(), "x: the reason") || want != ExitFailure && err.Error() != "x: the reason" {
			t.Errorf("%s: exit code %d, %v", code, ExitCode(err), err)
		}
	}
}
