// Package ocitest makes images and runs a registry for tests.
package ocitest

import (
	"archive/tar"
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/crypto/bcrypt"
)

// Entry is an entry of a layer. Text is the content of a file.
type Entry struct {
	tar.Header
	Text string
}

var epoch = time.Unix(1_600_000_000, 0)

// Dir returns a folder.
func Dir(name string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, ModTime: epoch}}
}

// File returns a file that everybody can read.
func File(name, text string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: epoch}, Text: text}
}

// Symlink returns a symbolic link.
func Symlink(name, to string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777, ModTime: epoch}}
}

// Hardlink returns a hard link to a file of this layer or a lower one.
func Hardlink(name, to string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to, Mode: 0o644, ModTime: epoch}}
}

// Device returns a device or, depending on kind, a pipe.
func Device(kind byte, name string, major, minor int64) Entry {
	return Entry{Header: tar.Header{Typeflag: kind, Name: name, Mode: 0o620, Devmajor: major, Devminor: minor, ModTime: epoch}}
}

// With changes an entry's header.
func (e Entry) With(change func(*tar.Header)) Entry { change(&e.Header); return e }

// Xattrs sets an entry's extended attributes. kv has names and values alternately.
func Xattrs(kv ...string) func(*tar.Header) {
	return func(h *tar.Header) {
		h.PAXRecords = map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			h.PAXRecords["SCHILY.xattr."+kv[i]] = kv[i+1]
		}
	}
}

// Archive makes a layer's tar archive.
func Archive(t testing.TB, entries []Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(e.Text))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.Text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Build makes an image from layers' archives. Its command is "/bin/x a b", as 1000:100 in
// /srv with A=4 and B=2=3.
func Build(t testing.TB, layers ...[]byte) v1.Image {
	t.Helper()
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		OS: "linux", Architecture: "amd64", RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{
			Entrypoint: []string{"/bin/x"}, Cmd: []string{"a", "b"}, Env: []string{"A=1", "B=2=3", "A=4"},
			User: "1000:100", WorkingDir: "/srv",
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range layers {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

// ping is cap_net_raw=ep, as the kernel stores it (struct vfs_cap_data, version 2).
const ping = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// Variety returns the layers of an image with everything that layers can have.
func Variety() [][]Entry {
	owner := func(uid, gid int) func(*tar.Header) { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }
	mode := func(m int64) func(*tar.Header) { return func(h *tar.Header) { h.Mode = m } }
	long := strings.Repeat("long-name/", 20)
	return [][]Entry{
		{
			Dir(".", 0o755), Dir("etc", 0o755), File("etc/passwd", "root:x:0:0::/:\n"), Dir("usr", 0o755), Dir("usr/lib", 0o755), Symlink("lib", "usr/lib"),
			Dir("run", 0o755), Dir("var", 0o755), Symlink("var/run", "/run"), Dir("bin", 0o755),
			File("bin/su", "setuid").With(mode(0o4755)), File("bin/ping", "caps").With(mode(0o755)).With(Xattrs("security.capability", ping)),
			File("bin/tagged", "x").With(Xattrs("user.note", "a\x00b", "user.empty-ish", "1", "trusted.overlay.opaque", "y", "security.selinux", "label\x00")),
			Dir("home", 0o750).With(owner(1000, 100)), File("home/mine", "me").With(owner(1000, 4_000_000_000)), Dir("tmp", 0o1777),
			Dir("gone", 0o755), File("gone/a", "a"), File("gone/b", "b"), Dir("gone/deep", 0o755), File("gone/deep/c", "c"),
			Dir("opaque", 0o700), File("opaque/old", "old"), Dir("opaque/sub", 0o755), File("opaque/sub/old", "old"),
			File("victim", "v"), File("was-file", "f"), Dir("was-dir", 0o755), File("was-dir/x", "x"), Symlink("was-link", "etc"),
			File("first", "linked"), Hardlink("second", "first"), Hardlink("etc/third", "second"), Symlink("sym", "nowhere"), Hardlink("sym2", "sym"),
			Device(tar.TypeChar, "null", 1, 3), Device(tar.TypeBlock, "loop", 7, 300), Device(tar.TypeFifo, "pipe", 0, 0).With(owner(5, 6)),
			File("odd \n \"name\" ünï\xff", "odd"), File(long+"file", "long"), Symlink("far", strings.Repeat("x/", 300)),
			File("zeros", strings.Repeat("\x00", 100_000)+"end"), File("holes", "start"+strings.Repeat("\x00", 100_000)), File("empty", ""),
		},
		{
			File("lib/by-link", "in usr/lib"), File("var/run/by-absolute-link", "in run"), File("no/entry/of/parents", "p"),
			File(".wh.gone", ""), File(".wh.victim", ""), File(".wh.never-was", ""), File("never/.wh.was", ""),
			Dir("opaque", 0o711), File("opaque/.wh..wh..opq", ""), File("opaque/new", "new"), Dir("opaque/sub", 0o755), File("opaque/sub/new", "new"),
			Dir("was-file", 0o755), File("was-file/x", "x"), File("was-dir", "now a file"), Dir("was-link", 0o755), File("was-link/x", "not in etc"),
			Hardlink("fourth", "etc/third"), File("bin/su", "setuid, new").With(mode(0o6711)),
			Dir("home", 0o700).With(owner(7, 8)).With(Xattrs("user.dir", "d")),
		},
		{
			File(".wh.first", ""), File("second", "another"), Dir("gone", 0o755), File("gone/back", "back"),
			File("etc/.wh.third", ""), File("usr/lib/.wh.by-link", ""), File("twice", "1"), File("twice", "2"), Hardlink("bin/su2", "bin/su"),
		},
	}
}

// Registry runs the distribution's registry server with one user, and returns its address.
func Registry(t testing.TB, user, password string) (host string) {
	t.Helper()
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("needs docker-registry to serve images")
	}
	home := t.TempDir()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) string {
		p := filepath.Join(home, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	users := write("htpasswd", user+":"+string(hash)+"\n")
	config := write("config.yml", fmt.Sprintf("version: 0.1\nlog: {level: info, formatter: text}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: \"127.0.0.1:0\", secret: test}\nauth: {htpasswd: {realm: test, path: %q}}\n", filepath.Join(home, "data"), users))
	cmd := exec.Command(program, "serve", config)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	address := make(chan string, 1)
	done := make(chan struct{})
	go func() { // ends with the server
		defer close(done)
		listening := regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+)`)
		for s := bufio.NewScanner(log); s.Scan(); {
			if m := listening.FindStringSubmatch(s.Text()); m != nil {
				address <- m[1]
			}
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		_ = cmd.Wait()
	})
	select {
	case a := <-address:
		return a
	case <-done:
		t.Fatal("the registry ended")
	case <-time.After(time.Minute):
		t.Fatal("the registry did not start to listen")
	}
	return ""
}
