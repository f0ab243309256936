package files

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/envd/account"
)

// changing is the writer of a response whose file changes once its first bytes are read.
type changing struct {
	*httptest.ResponseRecorder
	change func()
}

func (c *changing) Write(b []byte) (int, error) {
	if c.change != nil {
		c.change()
		c.change = nil
	}
	return c.ResponseRecorder.Write(b)
}

// TestFileChangesWhileRead reads a file that grows or shrinks between its first and its
// last bytes.
func TestFileChangesWhileRead(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: the daemon runs as root")
	}
	root, err := account.Lookup("root")
	if err != nil {
		t.Fatal(err)
	}
	text := bytes.Repeat([]byte("0123456789abcdef"), 4*buffer/16)
	file := filepath.Join(t.TempDir(), "log")
	// get requests the file from a handler while it changes, and reports whether the
	// response broke off.
	get := func(h http.HandlerFunc, size int64) (body []byte, broken bool) {
		t.Helper()
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequestWithContext(account.NewContext(t.Context(), root), http.MethodGet, "/?"+url.Values{"path": {file}}.Encode(), nil)
		w := &changing{httptest.NewRecorder(), func() {
			if err := os.Truncate(file, size); err != nil {
				t.Error(err)
			}
		}}
		defer func() {
			body = w.Body.Bytes()
			if e := recover(); e != nil {
				if err, ok := e.(error); !ok || !errors.Is(err, http.ErrAbortHandler) {
					panic(e)
				}
				broken = true
			}
		}()
		h(w, r)
		if w.Code != http.StatusOK {
			t.Errorf("status %d", w.Code)
		}
		return w.Body.Bytes(), false
	}
	if body, broken := get(download, int64(2*len(text))); broken || !bytes.Equal(body, text) {
		t.Errorf("a file that grew: %d bytes, broken off: %v", len(body), broken)
	}
	if body, broken := get(download, 0); broken || len(body) == 0 || !bytes.HasPrefix(text, body) {
		t.Errorf("a file that was truncated: %d bytes, broken off: %v", len(body), broken)
	}
	if body, broken := get(pack, int64(2*len(text))); broken || !bytes.Equal(only(t, body), text) {
		t.Errorf("an archive of a file that grew broke off: %v", broken)
	}
	if body, broken := get(pack, 0); !broken {
		t.Errorf("an archive of a file that was truncated has all its %d bytes", len(only(t, body)))
	}
}

// only returns the content of an archive's first file.
func only(t *testing.T, archive []byte) []byte {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(archive))
	if _, err := r.Next(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
