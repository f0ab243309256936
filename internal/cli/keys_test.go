package cli

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// TestKeyCurrent checks that `key current` prints the key that the other commands use.
func TestKeyCurrent(t *testing.T) {
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	t.Setenv("WRENN_URL", "")
	t.Setenv("WRENN_API_KEY", "")
	dir := t.TempDir()
	server := filepath.Join(dir, "server.env")
	for file, text := range map[string]string{
		filepath.Join(dir, "credentials.json"): `{"url":"http://here","api_key":"wrn_here"}`,
		server:                                 "WRENN_LISTEN=x\n  WRENN_ADMIN_API_KEY=\"wrn_admin\"\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	current := func(args ...string) (string, error) {
		var out bytes.Buffer
		err := command(&out, io.Discard, append([]string{"key", "current"}, args...)...).ExecuteContext(t.Context())
		return out.String(), err
	}
	for _, c := range []struct {
		env, want string
		args      []string
	}{
		{"", "wrn_here\n", nil},
		{"wrn_env", "wrn_env\n", []string{"--url", "http://elsewhere"}},
		{"wrn_env", "wrn_flag\n", []string{"--url", "http://elsewhere", "--api-key", "wrn_flag"}},
		{"", "wrn_admin\n", []string{"--file", server}},
		{"", "", []string{"--url", "http://elsewhere"}},
		{"wrn_env", "", []string{"--file", filepath.Join(dir, "credentials.json")}},
		{"wrn_env", "", []string{"--file", filepath.Join(dir, "missing")}},
	} {
		t.Setenv("WRENN_API_KEY", c.env)
		got, err := current(append([]string{"--dir", dir}, c.args...)...)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q with WRENN_API_KEY=%s: %q, %v", c.args, c.env, got, err)
		}
	}
	// Without credentials on this machine, the server's file is enough.
	if got, err := current("--dir", t.TempDir(), "--file", server); got != "wrn_admin\n" || err != nil {
		t.Errorf("without credentials: %q, %v", got, err)
	}
}
