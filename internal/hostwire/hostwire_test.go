package hostwire

import (
	"io/fs"
	"net/http"
	"os"
	"strings"
	"testing"
)

// TestStatedOnce checks that no other package spells these conventions again. Tests may,
// so that they fail if a value changes.
func TestStatedOnce(t *testing.T) {
	files := 0
	root := os.DirFS("../..")
	for _, dir := range []string{"cmd", "internal"} {
		err := fs.WalkDir(root, dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			if strings.HasPrefix(path, "internal/hostwire/") || strings.HasPrefix(path, "internal/gen/") {
				return nil
			}
			files++
			text, err := fs.ReadFile(root, path)
			for _, word := range []string{"49983", `"/proxy/`, "://agent/proxy", `"X-Wrenn-`, `"Process-Timeout"`, `"Process-Hold-Start"`, `"Wrenn-Error-Reason"`, `"Wrenn-Sandbox-State"`, `"X-Access-Token"`} {
				if strings.Contains(string(text), word) {
					t.Errorf("%s has %s, which is stated here", path, word)
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if files < 200 {
		t.Errorf("looked at %d files", files)
	}
}

func TestRefusedState(t *testing.T) {
	for _, tt := range []struct {
		status      int
		error, want string
	}{{503, "paused", "paused"}, {200, "paused", ""}, {503, "", ""}} {
		resp := &http.Response{StatusCode: tt.status, Header: http.Header{Error: {tt.error}}}
		if got := RefusedState(resp); got != tt.want {
			t.Errorf("%d with %q: %q, want %q", tt.status, tt.error, got, tt.want)
		}
	}
}
