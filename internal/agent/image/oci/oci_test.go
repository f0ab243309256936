package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/image/oci/ocitest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/oci/ocitest/listing"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// Short names for the tests below.
type entry = ocitest.Entry

var (
	dir, file, symlink, hardlink, device = ocitest.Dir, ocitest.File, ocitest.Symlink, ocitest.Hardlink, ocitest.Device
	xattrs, archive, build, variety      = ocitest.Xattrs, ocitest.Archive, ocitest.Build, ocitest.Variety
	epoch                                = time.Unix(1_600_000_000, 0)
)

func describeTree(t testing.TB, root string) []string {
	t.Helper()
	lines, err := listing.Of(root)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make devices and give files away")
	}
}

func ofLayers(t testing.TB, layers ...[]entry) *Image {
	t.Helper()
	var archives [][]byte
	for _, l := range layers {
		archives = append(archives, archive(t, l))
	}
	img, err := newImage(build(t, archives...), func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func run(t *testing.T, program string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), program, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", program, err, out)
	}
}

// TestAsReference pushes an image to a real registry, in an index beside another
// platform's, and unpacks it from the registry, from a layout and from archives. Each
// result equals umoci's, including attributes.
func TestAsReference(t *testing.T) {
	needRoot(t)
	host := ocitest.Registry(t, "reader", "s3cret")
	var archives [][]byte
	for _, l := range variety() {
		archives = append(archives, archive(t, l))
	}
	img := build(t, archives...)
	arm, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: "arm64"})
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.AppendManifests(
		empty.Index,
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}},
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
	)
	ref, err := name.ParseReference(host + "/team/variety:v1")
	if err != nil {
		t.Fatal(err)
	}
	auth := &authn.Basic{Username: "reader", Password: "s3cret"}
	if err := remote.WriteIndex(ref, index, remote.WithAuth(auth), remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}

	access := Access{Username: "reader", Password: "s3cret", Loopback: true}
	got, err := Registry(t.Context(), ref.String(), access)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	want := Config{Entrypoint: []string{"/bin/x"}, Cmd: []string{"a", "b"}, Env: map[string]string{"A": "4", "B": "2=3"}, User: "1000:100", WorkingDir: "/srv"}
	if fmt.Sprint(got.Config()) != fmt.Sprint(want) {
		t.Errorf("configuration is %+v, not %+v", got.Config(), want)
	}
	root := filepath.Join(t.TempDir(), "root")
	if err := got.Unpack(t.Context(), root, Limits{}); err != nil {
		t.Fatal(err)
	}
	ours := describeTree(t, root)

	for what, wrong := range map[string]Access{
		"nobody":         {Loopback: true},
		"wrong password": {Username: "reader", Password: "secret", Loopback: true},
		"no loopback":    {Username: "reader", Password: "s3cret"},
	} {
		if img, err := Registry(t.Context(), ref.String(), wrong); err == nil {
			img.Close()
			t.Errorf("%s could read the image", what)
		} else if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: the error has the password: %v", what, err)
		}
	}
	if _, err := Registry(t.Context(), host+"/team/none", access); err == nil {
		t.Error("it found a missing image")
	}
	// Docker's own configuration also has credentials.
	home := t.TempDir()
	t.Setenv("DOCKER_CONFIG", home)
	config := fmt.Sprintf(`{"auths":{%q:{"username":"reader","password":"s3cret"}}}`, host)
	if err := os.WriteFile(filepath.Join(home, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	keychain, err := Registry(t.Context(), ref.String(), Access{Keychain: true, Loopback: true})
	if err != nil {
		t.Fatal(err)
	}
	keychain.Close()

	t.Run("umoci", func(t *testing.T) {
		for _, tool := range []string{"skopeo", "umoci"} {
			if _, err := exec.LookPath(tool); err != nil {
				t.Skipf("needs %s for the expected result", tool)
			}
		}
		work := t.TempDir()
		reference := filepath.Join(work, "layout")
		run(t, "skopeo", "--insecure-policy", "--override-arch", "amd64", "copy", "--src-tls-verify=false", "--src-creds", "reader:s3cret", "docker://"+ref.String(), "oci:"+reference+":v1")
		run(t, "umoci", "unpack", "--image", reference+":v1", filepath.Join(work, "bundle"))
		same(t, ours, describeTree(t, filepath.Join(work, "bundle", "rootfs")))
		// Images written by other programs can be read.
		saved := filepath.Join(work, "saved.tar")
		run(t, "skopeo", "--insecure-policy", "copy", "oci:"+reference+":v1", "docker-archive:"+saved+":team/variety:v1")
		packed := filepath.Join(work, "packed.tar")
		run(t, "skopeo", "--insecure-policy", "copy", "oci:"+reference+":v1", "oci-archive:"+packed+":v1")
		for what, open := range map[string]func() (*Image, error){
			"layout":                 func() (*Image, error) { return Layout(reference, "v1") },
			"layout, no tag":         func() (*Image, error) { return Layout(reference, "") },
			"archive of OCI's":       func() (*Image, error) { return Archive(t.Context(), packed, "v1", work, Limits{}) },
			"docker save":            func() (*Image, error) { return Archive(t.Context(), saved, "team/variety:v1", work, Limits{}) },
			"docker save's only one": func() (*Image, error) { return Archive(t.Context(), saved, "", work, Limits{}) },
		} {
			img, err := open()
			if err != nil {
				t.Errorf("%s: %v", what, err)
				continue
			}
			root := filepath.Join(t.TempDir(), "root")
			if err := img.Unpack(t.Context(), root, Limits{}); err != nil {
				t.Errorf("%s: %v", what, err)
			} else {
				same(t, describeTree(t, root), ours)
			}
			if err := img.Close(); err != nil {
				t.Error(err)
			}
		}
		if left, _ := filepath.Glob(filepath.Join(work, "layout-*")); len(left) != 0 {
			t.Errorf("unpacking left %v", left)
		}
		for _, tag := range []string{"v2", "team/variety:v2"} {
			if _, err := Layout(reference, tag); err == nil {
				t.Errorf("layout has %s", tag)
			}
			if _, err := Archive(t.Context(), saved, tag, work, Limits{}); err == nil {
				t.Errorf("archive has %s", tag)
			}
		}
	})
}

func same(t *testing.T, got, want []string) {
	t.Helper()
	for _, l := range got {
		if !slices.Contains(want, l) {
			t.Errorf("ours: %s", l)
		}
	}
	for _, l := range want {
		if !slices.Contains(got, l) {
			t.Errorf("theirs: %s", l)
		}
	}
}

// TestVariety states the most important results explicitly.
func TestVariety(t *testing.T) {
	needRoot(t)
	root := filepath.Join(t.TempDir(), "root")
	if err := ofLayers(t, variety()...).Unpack(t.Context(), root, Limits{}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"usr/lib/by-link": "", "run/by-absolute-link": "in run", "gone/back": "back", "gone/a": "", "victim": "", "opaque/new": "new", "opaque/old": "",
		"opaque/sub/new": "new", "opaque/sub/old": "", "was-file/x": "x", "was-dir": "now a file", "was-link/x": "not in etc", "etc/x": "",
		"first": "", "second": "another", "fourth": "linked", "etc/third": "", "twice": "2", "etc/passwd": "root:x:0:0::/:\n",
		"holes": "start" + strings.Repeat("\x00", 100_000),
	} {
		data, err := os.ReadFile(filepath.Join(root, name))
		if want == "" {
			if !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s exists: %v", name, err)
			}
		} else if string(data) != want {
			t.Errorf("%s is %q, %v", name, data, err)
		}
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(root, "holes"), &st); err != nil || st.Blocks*512 > 8192 {
		t.Errorf("a file of zeros takes %d bytes, %v", st.Blocks*512, err)
	}
	if err := unix.Lstat(filepath.Join(root, "etc"), &st); err != nil || st.Mtim.Sec != epoch.Unix() {
		t.Errorf("a folder's time is %v, %v", st.Mtim, err)
	}
	for _, name := range []string{"trusted.overlay.opaque", "security.selinux"} {
		if _, err := unix.Lgetxattr(filepath.Join(root, "bin/tagged"), name, nil); !errors.Is(err, unix.ENODATA) {
			t.Errorf("%s was copied: %v", name, err)
		}
	}
}

// TestOrder has white-outs before and after the entries of their layer.
func TestOrder(t *testing.T) {
	needRoot(t)
	lower := []entry{dir("d", 0o755), file("d/old", "o"), dir("d/s", 0o755), file("d/s/old", "o"), file("f", "old")}
	made := []entry{dir("d", 0o755), file("d/new", "n"), file("d/s/new", "n"), file("f", "new")}
	for what, outs := range map[string][]entry{
		"opaque": {file("d/.wh..wh..opq", "")}, "white-out": {file(".wh.d", "")}, "file": {file("d/.wh..wh..opq", ""), file(".wh.f", "")},
	} {
		for order, upper := range map[string][]entry{"before": slices.Concat(outs, made), "after": slices.Concat(made, outs)} {
			root := filepath.Join(t.TempDir(), "root")
			if err := ofLayers(t, lower, upper).Unpack(t.Context(), root, Limits{}); err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, l := range describeTree(t, root) {
				names = append(names, strings.Fields(l)[0])
			}
			if got, want := strings.Join(names, " "), `"." "d" "d/new" "d/s" "d/s/new" "f"`; got != want {
				t.Errorf("%s %s: the tree has %s, not %s", what, order, got, want)
			}
			if data, err := os.ReadFile(filepath.Join(root, "f")); string(data) != "new" {
				t.Errorf("%s %s: f is %q, %v", what, order, data, err)
			}
		}
	}
}

// outside returns a folder with a file that an image beside it could damage.
func outside(t testing.TB) (dir string, check func()) {
	t.Helper()
	dir = t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("good"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(secret, epoch, epoch); err != nil {
		t.Fatal(err)
	}
	before := describeTree(t, secret)
	return dir, func() {
		t.Helper()
		if after := describeTree(t, secret); !slices.Equal(after, before) {
			t.Fatalf("a file outside was %q, is %q", before, after)
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != "root" && e.Name() != "secret" {
				t.Fatalf("%s was created outside", e.Name())
			}
		}
	}
}

func TestHostile(t *testing.T) {
	needRoot(t)
	one := func(e ...entry) [][]entry { return [][]entry{e} }
	for what, c := range map[string]struct {
		layers  [][]entry
		refused bool
		there   string // a file that must exist
	}{
		"name upwards":                {one(file("../secret", "evil")), true, ""},
		"name upwards within":         {one(dir("a", 0o755), file("a/../../secret", "evil")), true, ""},
		"absolute name":               {one(file("/secret", "evil")), false, "secret"},
		"write through a link":        {one(symlink("l", ".."), file("l/secret", "evil")), false, "secret"},
		"write through a long link":   {one(symlink("l", "../../../../../../../.."), file("l/tmp/x", "evil")), false, "tmp/x"},
		"write through an absolute":   {one(dir("etc", 0o755), symlink("l", "/etc"), file("l/x", "evil")), false, "etc/x"},
		"write through links' links":  {one(dir("d", 0o755), symlink("a", "b"), symlink("b", "/d/.."), file("a/secret", "evil")), false, "secret"},
		"write onto a link":           {one(symlink("l", "../secret"), file("l", "evil")), false, "l"},
		"write onto a link, by layer": {[][]entry{{symlink("l", "../secret")}, {file("l", "evil")}}, false, "l"},
		"chmod a link":                {one(symlink("l", "../secret").With(func(h *tar.Header) { h.Mode = 0o777; h.Uid = 5 })), false, ""},
		"folder onto a link":          {[][]entry{{symlink("l", "..")}, {dir("l", 0o777), file("l/secret", "evil")}}, false, "l/secret"},
		"through a loop":              {one(symlink("a", "b"), symlink("b", "a"), file("a/x", "evil")), true, ""},
		"through a link to nowhere":   {one(symlink("a", "/none/at/all"), file("a/x", "evil")), true, ""},
		"through a file":              {one(file("a", ""), file("a/x", "evil")), true, ""},
		"through /proc":               {one(symlink("p", "/proc/self/root"), file("p/secret", "evil")), true, ""},
		"hard link upwards":           {one(hardlink("l", "../secret")), true, ""},
		"hard link through a link":    {one(symlink("l", ".."), hardlink("x", "l/secret")), true, ""},
		"hard link, then write":       {one(symlink("s", "../secret"), hardlink("x", "s"), file("x", "evil")), false, "x"},
		"hard link to a folder":       {one(dir("d", 0o755), hardlink("x", "d")), true, ""},
		"hard link to the root":       {one(hardlink("x", "/")), true, ""},
		"hard link to itself":         {one(file("x", "x"), hardlink("x", "./x")), false, "x"},
		"white-out upwards":           {one(file("../.wh.secret", "")), true, ""},
		"white-out of ..":             {one(file("a/.wh...", "")), false, ""}, // a does not exist
		"white-out of .., in root":    {one(file(".wh...", "")), true, ""},
		"white-out of .":              {one(file(".wh..", "")), true, ""},
		"white-out of nothing":        {one(file(".wh.", "")), true, ""},
		"white-out through a link":    {one(symlink("l", ".."), file("l/.wh.secret", "")), false, ""},
		"white-out of a link":         {[][]entry{{symlink("l", "../secret")}, {file(".wh.l", "")}}, false, ""},
		"opaque through a link":       {[][]entry{{symlink("l", ".."), file("x", "x")}, {file("l/.wh..wh..opq", "")}}, false, ""},
		"opaque root's root":          {one(file("../.wh..wh..opq", "")), true, ""},
		"white-out through a file":    {one(file("a", ""), file("a/.wh.x", "")), true, ""},
		"aufs's own":                  {one(file(".wh..wh.plnk/1.2", "x"), file(".wh..wh.aufs", "")), false, ""},
		"overlayfs's white-out":       {one(device(tar.TypeChar, "x", 0, 0)), true, ""},
		"no such device":              {one(device(tar.TypeBlock, "x", 1<<12, 0)), true, ""},
		"device onto a link":          {one(symlink("x", "../secret"), device(tar.TypeChar, "x", 1, 3)), false, ""},
		"root as a file":              {one(file(".", "")), true, ""},
		"root as a link":              {one(symlink("./", "/")), true, ""},
		"unchanged owner":             {one(file("x", "").With(func(h *tar.Header) { h.Uid = 1<<32 - 1 })), true, ""},
		"negative owner":              {one(file("x", "").With(func(h *tar.Header) { h.Gid = -1; h.Format = tar.FormatGNU })), true, ""},
		"deep":                        {one(file(strings.Repeat("a/", maxDepth+1)+"x", "")), true, ""},
		"long":                        {one(file(strings.Repeat(strings.Repeat("a", 200)+"/", 21)+"x", "")), true, ""},
		"component too long":          {one(file(strings.Repeat("a", 256), "")), true, ""},
		"unknown type":                {one(entry{Header: tar.Header{Typeflag: 'Z', Name: "x"}}), true, ""},
		"twice, other kinds":          {one(dir("x", 0o755), file("x/y", ""), file("x", "file"), dir("x", 0o755), symlink("x", "y"), file("x", "last")), false, "x"},
		"bad capability":              {one(file("x", "").With(xattrs("security.capability", "?"))), true, ""},
		"too many":                    {one(slices.Repeat([]entry{file("x", "")}, 101)...), true, ""},
		"too large":                   {one(file("x", strings.Repeat("x", 1<<20))), true, ""},
		"too large together":          {[][]entry{{file("x", strings.Repeat("x", 600<<10))}, {file("x", strings.Repeat("y", 600<<10))}}, true, ""},
	} {
		t.Run(what, func(t *testing.T) {
			dir, check := outside(t)
			root := filepath.Join(dir, "root")
			err := ofLayers(t, c.layers...).Unpack(t.Context(), root, Limits{Bytes: 1 << 20, Entries: 100})
			check()
			if c.refused != (err != nil) {
				t.Fatalf("it was unpacked: %v", err)
			}
			if err != nil {
				if _, err := os.Lstat(root); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("unpacking left %v", err)
				}
				return
			}
			if c.there != "" {
				if info, err := os.Lstat(filepath.Join(root, c.there)); err != nil || !info.Mode().IsRegular() {
					t.Errorf("%s: %v, %v", c.there, info, err)
				}
			}
		})
	}
}

// TestBombs has archives that expand, by compression and by holes.
func TestBombs(t *testing.T) {
	needRoot(t)
	for what, layer := range map[string]func(w io.Writer) error{
		"gzip": func(w io.Writer) error {
			// It claims to be large; only reading shows how large it is.
			z := gzip.NewWriter(w)
			h := tar.Header{Typeflag: tar.TypeReg, Name: "x", Size: 4 << 30, Format: tar.FormatGNU}
			t := tar.NewWriter(z)
			if err := t.WriteHeader(&h); err != nil {
				return err
			}
			if _, err := io.CopyN(t, zeroReader{}, 8<<20); err != nil {
				return err
			}
			return z.Close()
		},
		"behind the end": func(w io.Writer) error {
			z := gzip.NewWriter(w)
			if _, err := io.CopyN(z, zeroReader{}, 8<<20); err != nil {
				return err
			}
			return z.Close()
		},
		"sparse": func(w io.Writer) error { _, err := w.Write(sparseEntry(1 << 50)); return err },
	} {
		t.Run(what, func(t *testing.T) {
			var b bytes.Buffer
			if err := layer(&b); err != nil {
				t.Fatal(err)
			}
			dir, check := outside(t)
			img, err := newImage(build(t, b.Bytes()), func() error { return nil })
			if err != nil {
				t.Fatal(err)
			}
			if err := img.Unpack(t.Context(), filepath.Join(dir, "root"), Limits{Bytes: 2 << 20}); !errors.Is(err, ErrRefused) {
				t.Errorf("it was unpacked: %v", err)
			}
			check()
		})
	}
	t.Run("sparse within bounds", func(t *testing.T) {
		root := filepath.Join(t.TempDir(), "root")
		img, err := newImage(build(t, sparseEntry(4<<20)), func() error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		if err := img.Unpack(t.Context(), root, Limits{Bytes: 8 << 20}); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(filepath.Join(root, "s"))
		if err != nil || len(data) != 4<<20 || !bytes.HasPrefix(data, []byte("data\x00")) {
			t.Errorf("%d bytes, %v", len(data), err)
		}
	})
}

type zeroReader struct{}

func (zeroReader) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// sparseEntry returns an archive of one file, "s", with "data" and a hole, in GNU's
// format 1.0 (tar's manual, "Storing Sparse Files").
func sparseEntry(size int64) []byte {
	block := func(b []byte) []byte { return append(b, make([]byte, (512-len(b)%512)%512)...) }
	header := func(name string, kind byte, n int) []byte {
		h := make([]byte, 512)
		copy(h, name)
		copy(h[100:], "0000644\x00")
		copy(h[108:], "0000000\x00")
		copy(h[116:], "0000000\x00")
		copy(h[124:], fmt.Sprintf("%011o\x00", n))
		copy(h[136:], "00000000000\x00")
		copy(h[148:], "        ")
		h[156] = kind
		copy(h[257:], "ustar\x0000")
		sum := 0
		for _, c := range h {
			sum += int(c)
		}
		copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
		return h
	}
	record := func(k, v string) string {
		n := len(k) + len(v) + 3
		for len(fmt.Sprint(n))+len(k)+len(v)+3 != n {
			n = len(fmt.Sprint(n)) + len(k) + len(v) + 3
		}
		return fmt.Sprintf("%d %s=%s\n", n, k, v)
	}
	pax := record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.name", "s") + record("GNU.sparse.realsize", fmt.Sprint(size))
	data := append(block(fmt.Appendf(nil, "1\n0\n4\n")), "data"...)
	return slices.Concat(header("pax", 'x', len(pax)), block([]byte(pax)), header("s", '0', len(data)), block(data), make([]byte, 1024))
}

func TestConfig(t *testing.T) {
	c, err := newConfig(v1.Config{Env: []string{"A=1", "odd", "=x", "B=", "A=2"}})
	if err != nil || fmt.Sprint(c.Env) != "map[A:2 B:]" || c.User != "" {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestConfigRefuses(t *testing.T) {
	good := build(t)
	for what, change := range map[string]func(*v1.ConfigFile){
		"platform": func(c *v1.ConfigFile) { c.Architecture = "arm64" },
		"system":   func(c *v1.ConfigFile) { c.OS = "windows" },
		"layers": func(c *v1.ConfigFile) {
			c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, v1.Hash{Algorithm: "sha256", Hex: "00"})
		},
		"NUL in env": func(c *v1.ConfigFile) { c.Config.Env = []string{"A=\x00"} },
		"NUL in cmd": func(c *v1.ConfigFile) { c.Config.Cmd = []string{"\x00"} },
	} {
		file, err := good.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		file = file.DeepCopy()
		change(file)
		img, err := mutate.ConfigFile(good, file)
		if err != nil {
			t.Fatal(err)
		}
		closed := false
		if _, err := newImage(img, func() error { closed = true; return nil }); !errors.Is(err, ErrRefused) || !closed {
			t.Errorf("%s: %v, closed %v", what, err, closed)
		}
	}
}

// TestDigests changes one byte in each part of a layout.
func TestDigests(t *testing.T) {
	needRoot(t)
	img := build(t, archive(t, []entry{file("x", "text")}))
	write := func(t *testing.T) string {
		dir := t.TempDir()
		l, err := layout.Write(dir, empty.Index)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.AppendImage(img); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	blobs, err := filepath.Glob(filepath.Join(write(t), "blobs/sha256/*"))
	if err != nil || len(blobs) != 3 {
		t.Fatalf("blobs are %v, %v", blobs, err)
	}
	for _, b := range blobs {
		for what, change := range map[string]func(b []byte) []byte{
			// The last byte of a gzip file belongs to its length.
			"changed": func(b []byte) []byte {
				return bytes.Replace(bytes.Replace(b, []byte("amd64"), []byte(" amd6"), 1), []byte("schemaVersion"), []byte("schemaversion"), 1)
			},
			"cut":   func(b []byte) []byte { return b[:len(b)/2] },
			"empty": func([]byte) []byte { return nil },
			"another": func([]byte) []byte {
				var z bytes.Buffer
				w := gzip.NewWriter(&z)
				_, _ = w.Write(archive(t, []entry{file("x", "evil")}))
				_ = w.Close()
				return z.Bytes()
			},
		} {
			dir := write(t)
			p := filepath.Join(dir, "blobs/sha256", filepath.Base(b))
			data, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			changed := change(bytes.Clone(data))
			if bytes.Equal(changed, data) {
				continue
			}
			if err := os.WriteFile(p, changed, 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := Layout(dir, "")
			if err == nil {
				root := filepath.Join(t.TempDir(), "root")
				if err = got.Unpack(t.Context(), root, Limits{}); err == nil {
					t.Errorf("%s of %q: it was unpacked", what, data[:20])
				} else if _, err := os.Lstat(root); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("unpacking left %v", err)
				}
			}
		}
	}
	// Documents that are not regular files, or too large, are not read.
	for what, make := range map[string]func(p string) error{
		"link":  func(p string) error { return os.Symlink("/dev/zero", p) },
		"pipe":  func(p string) error { return unix.Mkfifo(p, 0o600) },
		"large": func(p string) error { return errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, maxDocument+1)) },
	} {
		dir := write(t)
		for _, doc := range []string{"index.json", blobOf(t, img)} {
			p := filepath.Join(dir, doc)
			if err := errors.Join(os.Remove(p), make(p)); err != nil {
				t.Fatal(err)
			}
			if _, err := Layout(dir, ""); err == nil {
				t.Errorf("it reads %s for %s", what, doc)
			}
			dir = write(t)
		}
	}
}

func blobOf(t *testing.T, img v1.Image) string {
	t.Helper()
	h, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join("blobs", h.Algorithm, h.Hex)
}

func TestCancel(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	root := filepath.Join(t.TempDir(), "root")
	if err := ofLayers(t, variety()...).Unpack(ctx, root, Limits{}); !errors.Is(err, context.Canceled) {
		t.Errorf("it was unpacked: %v", err)
	}
	if _, err := os.Lstat(root); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("unpacking left %v", err)
	}
}

// TestTransport checks where a registry, and its redirects, may point.
func TestTransport(t *testing.T) {
	target := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }))
	defer target.Close()
	get := func(p netaddr.Policy, url string) (*http.Response, error) {
		ctx, cancel := context.WithTimeout(t.Context(), await.Hang)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		tr := newTransport(p)
		defer tr.base.CloseIdleConnections()
		resp, err := tr.RoundTrip(r)
		if err == nil {
			resp.Body.Close()
		}
		return resp, err
	}
	if r, err := get(netaddr.Policy{Loopback: true}, target.URL); err != nil || r.StatusCode != http.StatusTeapot {
		t.Errorf("loopback, allowed: %v", err)
	}
	for _, url := range []string{target.URL, "https://localhost:1", "https://[::1]:1", "https://169.254.169.254/latest", "https://0.0.0.0:1", "https://[::ffff:127.0.0.1]:1", "https://[fe80::1]:1", "https://224.0.0.1", "https://10.0.0.1:8443", "https://192.168.1.1", "https://100.64.0.1", "https://[fd12::1]"} {
		if _, err := get(netaddr.Policy{}, url); !errors.Is(err, netaddr.ErrNotAllowed) {
			t.Errorf("%s: %v", url, err)
		}
	}
	// Addresses of guests and metadata services are always refused.
	for _, url := range []string{"https://10.11.0.7:8443", "https://[::ffff:10.11.0.7]:8443", "https://[64:ff9b::a0b:7]:8443", "https://169.254.169.254/latest"} {
		if _, err := get(netaddr.Policy{Loopback: true, Private: true}, url); !errors.Is(err, netaddr.ErrNotAllowed) {
			t.Errorf("%s, where private registries are allowed: %v", url, err)
		}
	}
	for url, want := range map[string]string{
		"http://localhost:5/x": "http", "http://127.0.0.9/x": "http", "http://[::1]/x": "http", "https://127.0.0.1/": "https",
		"http://registry.example/x": "https", "http://10.0.0.1:5000/": "https", "http://localhost.example/": "https", "http://127.0.0.1.example/": "https",
	} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := newTransport(netaddr.Policy{Loopback: true}).secured(r).URL.Scheme; got != want {
			t.Errorf("%s is contacted over %s", url, got)
		}
		if got := newTransport(netaddr.Policy{}).secured(r).URL.Scheme; got != "https" {
			t.Errorf("%s is contacted over %s although loopback is not allowed", url, got)
		}
	}
}

// FuzzLayer applies layers built from the input's lines, and the input itself. Nothing
// outside the tree may change, and nothing in it may be a link to a file outside.
func FuzzLayer(f *testing.F) {
	for _, s := range []string{
		"f a\n-\nf .wh.a\n", "l a ..\nf a/secret\n", "l a /\nf a/../secret\n", "h a ../secret\n", "d a\nf a/b\n-\nf a/.wh..wh..opq\nf a/c\n", "l a .\nh b a/secret\n", "f .wh...\n", "f a/.wh..\n",
		"l a b\nl b a\nf a/x\n", "d a\nl a/b ../..\n-\nf a/b/.wh.secret\n", "c a\n-\nd a\nf a/b", "f a\nh b a\n-\nf .wh.a\nf b\n", "d .\nl x ../secret\nf x\n", "f .wh.a/b\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		needRoot(t)
		var layers [][]byte
		for part := range bytes.SplitSeq(in, []byte("-\n")) {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			for line := range bytes.Lines(part) {
				p := bytes.Fields(line)
				if len(p) < 2 {
					continue
				}
				h := &tar.Header{Typeflag: tar.TypeReg, Name: string(p[1]), Mode: 0o7777, Uid: 1, PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y"}}
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
				case 'c':
					h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, 1, 3
				default:
					h.Size = 4
				}
				if w.WriteHeader(h) != nil {
					break
				}
				if h.Size > 0 {
					_, _ = w.Write([]byte("evil"))
				}
			}
			_ = w.Close()
			layers = append(layers, b.Bytes())
			if len(layers) == 4 {
				break
			}
		}
		for _, layers := range [][][]byte{layers, {in}} {
			dir, check := outside(t)
			root := filepath.Join(dir, "root")
			img, err := newImage(build(t, layers...), func() error { return nil })
			if err != nil {
				t.Fatal(err)
			}
			_ = img.Unpack(t.Context(), root, Limits{Bytes: 1 << 20, Entries: 1000})
			check()
		}
	})
}
