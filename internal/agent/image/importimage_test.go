package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/wrenn-dev/wrenn/internal/agent/image/oci"
)

// makeImage returns an image of one layer with files, folders (names end with "/") and
// links ("name -> target").
func makeImage(t *testing.T, files map[string]string) *oci.Image {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, text := range files {
		name, target, link := strings.Cut(name, " -> ")
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: int64(len(text))}
		switch {
		case link:
			h.Typeflag, h.Linkname = tar.TypeSymlink, target
		case strings.HasSuffix(name, "/"):
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: "amd64", RootFS: v1.RootFS{Type: "layers"}})
	if err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.AppendLayers(img, layer); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	found, err := oci.Layout(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := found.Close(); err != nil {
			t.Error(err)
		}
	})
	return found
}

func TestWriteRootfs(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to unpack an image")
	}
	for _, tool := range []string{"mke2fs", "e2fsck", "debugfs"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	outer := t.TempDir()
	envd := filepath.Join(outer, "envd")
	if err := os.WriteFile(envd, []byte("the daemon"), 0o644); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		files map[string]string
		want  map[string]string // part of debugfs's output for the path
	}{
		"one program": {map[string]string{"app": "x"}, map[string]string{"cat /app": "x", "stat /tmp": "Mode:  01777", "stat /root": "Mode:  0700", "stat /proc": "Type: directory", "stat /run": "Type: directory", "stat /sys": "Type: directory", "stat /etc": "Type: directory"}},
		"links in the way": {
			map[string]string{"sbin -> /usr/bin": "", "usr/bin/": "", "usr/local -> /opt": "", "opt/": "", "run -> var/run": "", "var/run/": ""},
			map[string]string{"cat /opt/bin/envd": "the daemon", "stat /usr/bin/wrenn-init": "/usr/local/bin/envd"},
		},
		"hostile": {
			map[string]string{"usr/local/bin/envd -> ../../../../../envd": "", "sbin/wrenn-init": "evil", "dev -> /etc": "", "proc": "evil", "tmp -> ../../..": ""},
			map[string]string{"stat /dev": "Type: directory", "stat /proc": "Type: directory"},
		},
		"hostile folders": {map[string]string{"usr/local/bin/envd/x": "", "sbin/wrenn-init/y/z": ""}, nil},
	} {
		t.Run(what, func(t *testing.T) {
			home := t.TempDir()
			rootfs, err := WriteRootfs(t.Context(), makeImage(t, c.files), home, envd, 32, nil)
			if err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("e2fsck", "-fn", rootfs).CombinedOutput(); err != nil {
				t.Errorf("e2fsck: %v: %s", err, out)
			}
			ask := func(request, want string) {
				t.Helper()
				out, err := exec.Command("debugfs", "-R", request, rootfs).CombinedOutput()
				if err != nil || !strings.Contains(string(out), want) {
					t.Errorf("%s: %v: %s, not %s", request, err, out, want)
				}
			}
			for request, want := range c.want {
				ask(request, want)
			}
			if what != "links in the way" {
				ask("cat /usr/local/bin/envd", "the daemon")
				ask("stat /usr/local/bin/envd", "Mode:  0755")
				ask("stat /sbin/wrenn-init", `Fast link dest: "/usr/local/bin/envd"`)
			}
			entries, err := os.ReadDir(home)
			if err != nil || len(entries) != 1 {
				t.Errorf("files beside the file system: %v, %v", entries, err)
			}
		})
	}
	if data, err := os.ReadFile(envd); err != nil || string(data) != "the daemon" {
		t.Errorf("the host's daemon is %q, %v", data, err)
	}
	for what, img := range map[string]*oci.Image{
		"too large":   makeImage(t, map[string]string{"x": strings.Repeat(fmt.Sprint(1), 40<<20)}),
		"a file etc":  makeImage(t, map[string]string{"etc": "x"}),
		"a file /usr": makeImage(t, map[string]string{"usr": "x"}),
	} {
		home := t.TempDir()
		if _, err := WriteRootfs(t.Context(), img, home, envd, 32, nil); err == nil {
			t.Errorf("%s: it succeeded", what)
		}
		if entries, err := os.ReadDir(home); err != nil || len(entries) != 0 {
			t.Errorf("%s: left behind %v, %v", what, entries, err)
		}
	}
}
