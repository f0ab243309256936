package programs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheckCaddy(t *testing.T) {
	for _, c := range []struct{ prints, want string }{
		{"v2.11.9 h1:bhZtcRKQOq0=", ""},
		{"v2.12.0", ""},
		{"3.0.0", ""},
		{"2.6.2", "2.6.2, which is too old"},
		{"v2.10.2 h1:x", "2.10.2, which is too old"},
		{"v1.99.0", "1.99.0, which is too old"},
		{"unknown", "does not say which version"},
		{"", "does not say which version"},
	} {
		path := filepath.Join(t.TempDir(), "caddy")
		if err := os.WriteFile(path, []byte("#!/bin/sh\nprintf '%s\\n' '"+c.prints+"'\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		err := checkCaddy(t.Context(), path)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: got %v, want %q", c.prints, err, c.want)
		}
	}
}

// TestFindCaddy finds one on PATH, where none is beside the program.
func TestFindCaddy(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if _, err := FindCaddy(t.Context()); err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("without any: %v", err)
	}
	path := filepath.Join(dir, "caddy")
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho 2.6.2\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := FindCaddy(t.Context()); err == nil || !strings.Contains(err.Error(), "too old") {
		t.Errorf("with Debian's: %v", err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho v2.11.9\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if got, err := FindCaddy(t.Context()); err != nil || got.File != path {
		t.Errorf("got %s, %v", got.File, err)
	}
}
