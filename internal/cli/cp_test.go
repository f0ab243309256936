package cli

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
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

func TestPackUnpack(t *testing.T) {
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
	for name, top := range map[string]string{"": "top", "other": "other"} {
		dir := t.TempDir()
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		if err := unpack(root, bytes.NewReader(archive.Bytes()), name); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, top, "d", "b"))
		if err != nil || string(b) != "2" {
			t.Errorf("got %q, %v", b, err)
		}
		if info, err := os.Stat(filepath.Join(dir, top, "a")); err != nil || info.Mode().Perm() != 0o750 {
			t.Errorf("got %v, %v", info, err)
		}
		if to, err := os.Readlink(filepath.Join(dir, top, "d", "link")); err != nil || to != "../a" {
			t.Errorf("got %q, %v", to, err)
		}
	}
}

// entries makes an archive of what a hostile guest might send.
func entries(t testing.TB, headers ...*tar.Header) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if h.Typeflag == tar.TypeReg {
			h.Size = 1
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.Close()
	return b.Bytes()
}

func FuzzUnpackStaysInside(f *testing.F) {
	for _, name := range []string{"../x", "/x", "a/../../x", "a"} {
		f.Add(entries(f, &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o600}))
	}
	f.Add(entries(f, &tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: ".."}, &tar.Header{Name: "l/x", Typeflag: tar.TypeReg, Mode: 0o600}))
	f.Add(entries(f, &tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../x"}, &tar.Header{Name: "l", Typeflag: tar.TypeReg, Mode: 0o600}))
	f.Fuzz(func(t *testing.T, b []byte) {
		outer := t.TempDir()
		inner := filepath.Join(outer, "in")
		if err := os.Mkdir(inner, 0o700); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(inner)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		_ = unpack(root, bytes.NewReader(b), "")
		left, err := os.ReadDir(outer)
		if err != nil || len(left) != 1 {
			t.Errorf("outside of the folder: %v, %v", left, err)
		}
	})
}
