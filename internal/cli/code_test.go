package cli

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/client"
)

// TestExceptionsAreText checks that an exception of a guest's code cannot control the
// terminal.
func TestExceptionsAreText(t *testing.T) {
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, `{"type":"error","name":"E","value":"v","traceback":"one\n\u001b]0;title\u0007two"}`)
		fmt.Fprintln(w, `{"type":"end_of_execution"}`)
	}))
	defer service.Close()
	var said bytes.Buffer
	wrenn := command(&said, &said, "code", "--url", service.URL, "--api-key", "key", "sandbox", "raise E")
	if err := wrenn.ExecuteContext(t.Context()); ExitCode(err) != 1 || said.String() != "one\n?]0;title?two\n" {
		t.Errorf("exit code %d, output %q", ExitCode(err), said.String())
	}
}

// TestPictures saves a hostile guest's pictures: it replaces no file, follows no link,
// and bounds their number and size.
func TestPictures(t *testing.T) {
	outer := t.TempDir()
	dir := filepath.Join(outer, "charts")
	bashrc := filepath.Join(outer, ".bashrc")
	for _, err := range []error{
		os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "chart-1.png"), []byte("mine"), 0o600),
		os.Symlink(bashrc, filepath.Join(dir, "chart-2.png")), // Its target does not exist.
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var said bytes.Buffer
	a, saved := &app{streams: streams{out: &said, err: &said}}, &pictures{dir: dir}
	for range 2 {
		if err := a.result(&client.CodeOutput{PNG: []byte("guest's")}, &said, saved); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{"chart-1.png": "mine", "chart-3.png": "guest's", "chart-4.png": "guest's"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want || !strings.Contains(said.String(), "chart-4.png") {
			t.Errorf("%s: %q, %v; it printed %q", name, b, err, said.String())
		}
	}
	if _, err := os.Lstat(bashrc); err == nil {
		t.Error("a link was followed")
	}
	for err := error(nil); err == nil; {
		if err = a.result(&client.CodeOutput{PNG: []byte("x")}, &said, saved); saved.n > maxPictures+1 {
			t.Fatalf("%d pictures were saved", saved.n)
		}
	}
	saved = &pictures{dir: dir, bytes: maxPictureBytes - 1}
	if err := a.result(&client.CodeOutput{PNG: []byte("xx")}, &said, saved); err == nil {
		t.Error("the pictures' size is not bounded")
	}
}
