package e2e

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestLetterInLog asks for a new password where no mail server is configured:
// the link is in the server's log.
func TestLetterInLog(t *testing.T) {
	i := up(t)
	resp := i.request(t, http.MethodPost, i.listen, "/v1/auth/password/forgot", http.Header{"Content-Type": {"application/json"}}, strings.NewReader(`{"email":"`+i.creds.Email+`"}`))
	if resp.StatusCode != http.StatusAccepted {
		t.Fatal(resp.Status)
	}
	logs := filepath.Join(i.dir, "logs")
	within(t, 2*time.Minute, "the letter is in "+logs, func() bool {
		files, err := filepath.Glob(filepath.Join(logs, "*server*"))
		if err != nil || len(files) == 0 {
			t.Fatalf("logs: %v, %v", files, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(b), "/reset-password#token=wrp_") && strings.Contains(string(b), i.creds.Email) {
				return true
			}
		}
		return false
	})
}
