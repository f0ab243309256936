package cli

import (
	"archive/tar"
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/id"
)

func TestParsePlace(t *testing.T) {
	sandbox := id.Format(id.Sandbox, uuid.New())
	for in, want := range map[string]place{
		"a":                  {"", "a"},
		"-":                  {"", "-"},
		"c:/x":               {"", "c:/x"},
		"cl-short:x":         {"", "cl-short:x"},
		sandbox + ":/x:y":    {sandbox, "/x:y"},
		sandbox + ":.":       {sandbox, "."},
		sandbox:              {"", sandbox},
		"./" + sandbox + ":": {"", "./" + sandbox + ":"},
	} {
		if got, err := parsePlace(in); err != nil || got != want {
			t.Errorf("%q: %v, %v; want %v", in, got, err, want)
		}
	}
	for _, bad := range []string{"", sandbox + ":"} {
		if got, err := parsePlace(bad); ExitCode(err) != ExitUsage {
			t.Errorf("%q: %v, %v", bad, got, err)
		}
	}
}

// serveArchive starts a service whose guest sends b for every request.
func serveArchive(t *testing.T, b []byte) {
	t.Helper()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(b) }))
	t.Cleanup(web.Close)
	t.Setenv("WRENN_URL", web.URL)
	t.Setenv("WRENN_API_KEY", "wrn_x")
}

// run runs a client command and returns its standard error.
func run(t *testing.T, args ...string) (stderr string, err error) {
	t.Helper()
	var out, said bytes.Buffer
	for _, c := range Commands(strings.NewReader(""), &out, &said) {
		if c.Name() != args[0] {
			continue
		}
		c.SilenceErrors, c.SilenceUsage = true, true
		c.SetArgs(args[1:])
		err := c.ExecuteContext(t.Context())
		return said.String(), err
	}
	t.Fatalf("no command %s", args[0])
	return "", nil
}

func TestPackAndCopyBack(t *testing.T) {
	src := t.TempDir()
	for name, text := range map[string]string{"a": "1", "d/b": "2", "d/e/c": ""} {
		if err := os.MkdirAll(filepath.Join(src, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(src, name), []byte(text), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../a", filepath.Join(src, "d", "link")); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := pack(&archive, src, "top"); err != nil {
		t.Fatal(err)
	}
	serveArchive(t, archive.Bytes())
	from := id.Format(id.Sandbox, uuid.New()) + ":/srv/asked"
	dir := t.TempDir()
	for target, want := range map[string]string{dir: filepath.Join(dir, "asked"), filepath.Join(dir, "other"): filepath.Join(dir, "other")} {
		if said, err := run(t, "cp", from, target); err != nil || said != "" {
			t.Fatalf("%v: %s", err, said)
		}
		b, err := os.ReadFile(filepath.Join(want, "d", "b"))
		if err != nil || string(b) != "2" {
			t.Errorf("got %q, %v", b, err)
		}
		if info, err := os.Stat(filepath.Join(want, "a")); err != nil || info.Mode().Perm() != 0o750 {
			t.Errorf("got %v, %v", info, err)
		}
		if to, err := os.Readlink(filepath.Join(want, "d", "link")); err != nil || to != "../a" {
			t.Errorf("got %q, %v", to, err)
		}
	}
	if _, err := run(t, "cp", from, dir); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Errorf("a second copy: %v", err)
	}
	if _, err := run(t, "cp", "--merge", from, dir); err != nil {
		t.Errorf("a second copy with --merge: %v", err)
	}
}

// TestCopyFromAHostileGuest runs `wrenn cp SANDBOX:f .` in a home directory, against a
// guest that sends other files than requested.
func TestCopyFromAHostileGuest(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: ".bashrc", Typeflag: tar.TypeReg, Mode: 0o644, Size: 4},
		{Name: ".ssh/", Typeflag: tar.TypeDir, Mode: 0o700},
		{Name: ".ssh/authorized_keys", Typeflag: tar.TypeReg, Mode: 0o600, Size: 4},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			_, _ = w.Write([]byte("evil"))
		}
	}
	w.Close()
	serveArchive(t, b.Bytes())
	home := t.TempDir()
	if err := os.WriteFile(filepath.Join(home, ".bashrc"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, "cp", id.Format(id.Sandbox, uuid.New())+":f", home); err == nil {
		t.Error("it was copied")
	}
	left, err := os.ReadDir(home)
	if err != nil || len(left) != 1 {
		t.Errorf("the home directory has %v, %v", left, err)
	}
	if b, _ := os.ReadFile(filepath.Join(home, ".bashrc")); string(b) != "mine" {
		t.Errorf(".bashrc is %q", b)
	}
}

// TestKeysStayWithTheirService calls another service than the one that this machine has a
// key for.
func TestKeysStayWithTheirService(t *testing.T) {
	asked := false
	web := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	defer web.Close()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "credentials.json"), []byte(`{"url":"http://localhost:1","api_key":"wrn_secret","email":"a@b","password":"secret"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("WRENN_URL", web.URL)
	t.Setenv("WRENN_API_KEY", "")
	for _, args := range [][]string{{"ls"}, {"team", "ls"}} {
		if _, err := run(t, append(args, "--dir", dir)...); err == nil || !strings.Contains(err.Error(), "is for http://localhost:1") {
			t.Errorf("%v: %v", args, err)
		}
	}
	if asked {
		t.Error("another service got a request")
	}
}

// TestClean checks that foreign text can neither control the terminal nor pass for other
// text.
func TestClean(t *testing.T) {
	for _, r := range "\x00\x1b\r\n\x7f\u0080\u009b\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069" {
		if got := clean("a" + string(r) + "b"); got != "a?b" {
			t.Errorf("%U: %q", r, got)
		}
	}
	const fine = "a\tb é 🐦 \u200d שלום"
	if got := clean(fine); got != fine {
		t.Errorf("%q became %q", fine, got)
	}
}
