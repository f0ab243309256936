package files

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/envd/account"
	"github.com/wrenn-dev/wrenn/internal/linear"
)

// FuzzUnpack checks that no archive changes anything outside the folder. It builds
// entries from the input's lines, and also unpacks the raw input.
func FuzzUnpack(f *testing.F) {
	for _, s := range []string{
		"f a\n", "f ../x\n", "l a ..\nf a/secret\n", "l a ../secret\nf a\n", "h a ../secret\nf a\n", "d a\nl a/b ../..\nf a/b/secret\n",
		"l a b\nl b ..\nd a/made\n", "f a\nd a\nf a/b\n", "l a .\nf a/a/a/x\n", "d .\nf ./x\nf /x\nh y x\n", "l a /tmp\nd a\n", "l x ../secret\nd x\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		outer := t.TempDir()
		secret, box := filepath.Join(outer, "secret"), filepath.Join(outer, "box")
		if err := os.WriteFile(secret, []byte("good"), 0o640); err != nil {
			t.Fatal(err)
		}
		when := time.Unix(1_500_000_000, 0)
		if err := os.Chtimes(secret, when, when); err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for line := range bytes.Lines(in) {
			p := bytes.Fields(line)
			if len(p) < 2 {
				continue
			}
			h := &tar.Header{Name: string(p[1]), Mode: 0o777, ModTime: time.Unix(1, 0)}
			if len(p) > 2 {
				h.Linkname = string(p[2])
			}
			switch p[0][0] {
			case 'd':
				h.Typeflag = tar.TypeDir
			case 'l':
				h.Typeflag = tar.TypeSymlink
			case 'h':
				h.Typeflag = tar.TypeLink
			default:
				h.Typeflag, h.Size = tar.TypeReg, 4
			}
			if w.WriteHeader(h) != nil {
				break
			}
			if h.Size > 0 {
				_, _ = w.Write([]byte("evil"))
			}
		}
		_ = w.Close()
		for _, archive := range [][]byte{b.Bytes(), in} {
			_ = unpackTree(bytes.NewReader(archive), box, nil)
			info, err := os.Lstat(secret)
			if err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(secret)
			if err != nil || string(text) != "good" || info.Mode() != 0o640 || !info.ModTime().Equal(when) {
				t.Fatalf("a file outside became %q, %v, %v", text, info.Mode(), info.ModTime())
			}
			entries, err := os.ReadDir(outer)
			if err != nil || len(entries) != 2 {
				t.Fatalf("outside there are %v, %v", entries, err)
			}
			// Nothing inside may be a link to a file outside.
			_ = filepath.WalkDir(box, func(p string, d fs.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() {
					if in, err := d.Info(); err == nil && os.SameFile(in, info) {
						t.Fatalf("%s is a file outside", p)
					}
				}
				return nil
			})
		}
	})
}

// TestUnpackTreeIsLinear checks that twice as many entries take twice as long.
func TestUnpackTreeIsLinear(t *testing.T) {
	linear.Check(t, "unpackTree", 500, func(n int) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for i := range n {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%d/", i), Mode: 0o755}); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if err := unpackTree(&b, t.TempDir(), nil); err != nil {
			t.Fatal(err)
		}
	})
}

// TestPackRefused packs a file that can be opened but not read. The client learns that
// while it has nothing of the archive.
func TestPackRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: the daemon runs as root")
	}
	root, err := account.Lookup("root")
	if err != nil {
		t.Fatal(err)
	}
	file := fmt.Sprintf("/proc/%d/mem", os.Getpid()) // nothing is at address 0
	r := httptest.NewRequestWithContext(account.NewContext(t.Context(), root), http.MethodGet, "/?"+url.Values{"path": {file}}.Encode(), nil)
	w := httptest.NewRecorder()
	pack(w, r)
	if w.Code < 400 || w.Header().Get("Content-Type") != "application/json" || !strings.Contains(w.Body.String(), file) {
		t.Errorf("%d %v %q", w.Code, w.Header(), w.Body)
	}
}
