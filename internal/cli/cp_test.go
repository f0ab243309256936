package cli

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/creack/pty"
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
	_, stderr, err = both(t, args...)
	return stderr, err
}

// both runs a client command and returns its output and its standard error.
func both(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, said bytes.Buffer
	for _, c := range Commands(strings.NewReader(""), &out, &said) {
		if c.Name() != args[0] {
			continue
		}
		c.SilenceErrors, c.SilenceUsage = true, true
		c.SetArgs(args[1:])
		err := c.ExecuteContext(t.Context())
		return out.String(), said.String(), err
	}
	t.Fatalf("no command %s", args[0])
	return "", "", nil
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

// hostileText is what a hostile guest or tenant would have a terminal show: an escape
// sequence in both encodings, and text that runs backwards.
const hostileText = "a\x1b[2Jb\u009b2Jc\u202ed\r\n"

// harmless reports whether a terminal shows text as it is.
func harmless(text string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && r != '\t' && controls(r) })
}

// TestTerminalEscapes has a service whose every response is hostile: no command passes
// control characters on, except those whose purpose that is.
func TestTerminalEscapes(t *testing.T) {
	text, err := json.Marshal(hostileText)
	if err != nil {
		t.Fatal(err)
	}
	fields := map[string]string{
		"/logs": hostileText,
		"":      `{"id":` + string(text) + `,"error":` + string(text) + `,"template":` + string(text) + `,"name":` + string(text) + `,"state":` + string(text) + `}`,
	}
	status := http.StatusOK
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body := fields[""]
		if strings.HasSuffix(r.URL.Path, "/logs") {
			body = fields["/logs"]
		}
		if status != http.StatusOK {
			body = `{"error":{"code":"x","message":` + string(text) + `}}`
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}))
	defer web.Close()
	t.Setenv("WRENN_URL", web.URL)
	t.Setenv("WRENN_API_KEY", "wrn_x")
	for _, args := range [][]string{
		{"create"},
		{"get", "s"},
		{"get", "-o", "json", "s"},
		{"logs", "s"},
		{"metrics", "s"},
		{"metrics", "-o", "json", "s"},
		{"template", "get", "x"},
		{"template", "get", "-o", "json", "x"},
		{"fork", "s"},
		{"revoke", "s"},
		{"ping", "s"},
	} {
		for _, status = range []int{http.StatusOK, http.StatusBadRequest} {
			out, said, _ := both(t, args...)
			if !harmless(out) || !harmless(said) {
				t.Errorf("%v, %d: %q, %q", args, status, out, said)
			}
		}
	}
	status = http.StatusOK
	if out, _, err := both(t, "logs", "s"); err != nil || out != "a?[2Jb?2Jc?d\n" {
		t.Errorf("logs: %q, %v", out, err)
	}
	if out, _, err := both(t, "logs", "--raw", "s"); err != nil || out != hostileText {
		t.Errorf("logs --raw: %q, %v", out, err)
	}
	out, _, err := both(t, "get", "-o", "json", "s")
	var got struct{ Error string }
	if err == nil {
		err = json.Unmarshal([]byte(out), &got)
	}
	if err != nil || got.Error != hostileText {
		t.Errorf("JSON has changed: %q, %v", got.Error, err)
	}
}

// TestFilter writes text in pieces of each length.
func TestFilter(t *testing.T) {
	const text, want = "é\r\n🐦\u009b\x1b\r.\xff\n", "é\n🐦???.\uFFFD\n"
	for n := 1; n <= len(text); n++ {
		var b strings.Builder
		f := &filter{to: &b}
		for left := text; left != ""; left = left[min(n, len(left)):] {
			if k, err := io.WriteString(f, left[:min(n, len(left))]); err != nil || k != min(n, len(left)) {
				t.Fatal(k, err)
			}
		}
		if got := b.String(); got != want {
			t.Errorf("in pieces of %d bytes: %q", n, got)
		}
	}
}

// TestTerminalsAreFiltered checks that control characters in a guest's output do not reach
// a terminal, unless the user asks for them, and that they do reach a pipe.
func TestTerminalsAreFiltered(t *testing.T) {
	master, slave, err := pty.Open()
	if err != nil {
		t.Skip(err)
	}
	defer master.Close()
	defer slave.Close()
	var piped strings.Builder
	filtered := &filter{to: slave}
	a := &app{streams: streams{out: filtered, err: filtered}, raw: streams{out: slave, err: &piped}}
	if a.guest(false).out != io.Writer(filtered) || a.guest(true).out != io.Writer(slave) || a.guest(false).err != io.Writer(&piped) {
		t.Error("the wrong streams")
	}
}
