package cli

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestRotateSecret(t *testing.T) {
	old := strings.Repeat("ab", 32)
	for name, content := range map[string]string{
		"env":    "A=1\nWRENN_SECRET_KEY=" + old + "\nB=2\n",
		"quoted": `WRENN_SECRET_KEY="` + old + `"` + "\n",
		"up":     `{"secret_key":"` + old + `","agent_token":"` + old + `"}`,
	} {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := rotateSecret(file, true); err == nil {
			t.Errorf("%s: it finished a rotation that nobody had started", name)
		}
		begun, err := rotateSecret(file, false)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := os.ReadFile(file)
		key := regexp.MustCompile(`[0-9a-f]{64},` + old).FindString(string(b))
		if key == "" || strings.Replace(string(b), key, old, 1) != content || !strings.HasPrefix(begun, key[:8]) {
			t.Fatalf("%s became %q", name, b)
		}
		if _, err := rotateSecret(file, false); err == nil {
			t.Errorf("%s: a second rotation started before the first was finished", name)
		}
		if _, err := rotateSecret(file, true); err != nil {
			t.Fatal(err)
		}
		b, _ = os.ReadFile(file)
		if got := strings.Replace(string(b), key[:64], old, 1); got != content {
			t.Errorf("%s became %q", name, b)
		}
		if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	other := filepath.Join(t.TempDir(), "x")
	for _, content := range []string{"", "A=1\n", "WRENN_SECRET_KEY=\n", "WRENN_SECRET_KEY=" + old + "\nWRENN_SECRET_KEY=" + old + "\n"} {
		_ = os.WriteFile(other, []byte(content), 0o600)
		if _, err := rotateSecret(other, false); err == nil {
			t.Errorf("%q was changed", content)
		}
	}
}
