package buildcontext

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/linear"
)

// fill creates a folder's files: a name with a trailing slash is a folder, "name ->
// target" a link, and anything else a file with the text.
func fill(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		name, target, link := strings.Cut(name, " -> ")
		p := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(p), 0o755)
		switch {
		case err != nil:
		case link:
			err = os.Symlink(target, p)
		case strings.HasSuffix(name, "/"):
			err = os.MkdirAll(p, 0o755)
		default:
			err = os.WriteFile(p, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// list returns a folder's files with their modes and contents.
func list(t testing.TB, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		text := ""
		switch {
		case d.Type().IsRegular():
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text = string(data)
		case d.Type()&fs.ModeSymlink != 0:
			if text, err = os.Readlink(p); err != nil {
				return err
			}
		}
		rel, err := filepath.Rel(dir, p)
		fmt.Fprintf(&b, "%s %v %q\n", rel, info.Mode(), text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func pack(t testing.TB, dir string) ([]byte, Digest) {
	t.Helper()
	var b bytes.Buffer
	d, err := Pack(t.Context(), &b, dir, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(b.Bytes()); d != digestOf(sum[:]) {
		t.Fatalf("the name %s is not the archive's digest", d)
	}
	return b.Bytes(), d
}

func TestThereAndBack(t *testing.T) {
	src := t.TempDir()
	fill(t, src, map[string]string{
		"a": "text", "a.b": "", "a-dir/x/y": "deep", "a-dir/up -> ../a": "", "empty/": "", "dangling -> a-dir/none": "",
		strings.Repeat("long", 60): "name", "ünï code": "x", strings.Repeat("d/", 100) + "f": "far", "self -> .": "",
	})
	if err := os.Chmod(filepath.Join(src, "a.b"), 0o4751); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(src, "empty"), 0o500); err != nil {
		t.Fatal(err)
	}
	archive, digest := pack(t, src)

	// Times and owners do not matter.
	other := time.Unix(1_000_000, 5)
	if err := os.Chtimes(filepath.Join(src, "a"), other, other); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Lchown(filepath.Join(src, "a"), 7, 8); err != nil {
			t.Fatal(err)
		}
	}
	if _, again := pack(t, src); again != digest {
		t.Errorf("the same files are %s and %s", digest, again)
	}

	dst := filepath.Join(t.TempDir(), "out")
	if err := unpack(t.Context(), bytes.NewReader(archive), digest, dst, Limits{}); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(src, "a.b"), 0o751); err != nil { // setuid is not packed
		t.Fatal(err)
	}
	if got, want := list(t, dst), list(t, src); got != want {
		t.Errorf("unpacked is\n%s, not\n%s", got, want)
	}
	if err := os.WriteFile(filepath.Join(src, "a"), []byte("tex!"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, again := pack(t, src); again == digest {
		t.Error("another content has the same digest")
	}
}

func TestIgnore(t *testing.T) {
	src := t.TempDir()
	fill(t, src, map[string]string{
		".dockerignore": "*", "keep": "", "x.log": "", "sub/x.log": "", "sub/keep": "", "node_modules/a/b": "", "node_modules/a/keep": "",
		".wrennignore": "# no logs\n**/*.log\nnode_modules\n!node_modules/a/keep\n",
	})
	archive, digest := pack(t, src)
	dst := filepath.Join(t.TempDir(), "out")
	if err := unpack(t.Context(), bytes.NewReader(archive), digest, dst, Limits{}); err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(list(t, dst)) {
		names = append(names, strings.Fields(line)[0])
	}
	if got, want := strings.Join(names, " "), ".dockerignore .wrennignore keep node_modules node_modules/a node_modules/a/keep sub sub/keep"; got != want {
		t.Errorf("it packs %s, not %s", got, want)
	}
	fill(t, src, map[string]string{".wrennignore": "[a"})
	if _, err := Pack(t.Context(), &bytes.Buffer{}, src, Limits{}); err == nil {
		t.Error("an invalid pattern is accepted")
	}
}

func TestPackRefuses(t *testing.T) {
	for name, make := range map[string]func(dir string) error{
		"link out":           func(d string) error { return os.Symlink("../x", filepath.Join(d, "l")) },
		"absolute link":      func(d string) error { return os.Symlink(filepath.Join(d, "a"), filepath.Join(d, "l")) },
		"link up in its way": func(d string) error { return os.Symlink("a/../a", filepath.Join(d, "l")) },
		"pipe":               func(d string) error { return unix.Mkfifo(filepath.Join(d, "l"), 0o600) },
		"too many": func(d string) error {
			return errors.Join(os.Mkdir(filepath.Join(d, "l"), 0o700), os.Mkdir(filepath.Join(d, "m"), 0o700))
		},
		"too large": func(d string) error { return os.WriteFile(filepath.Join(d, "l"), []byte("12345678"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			fill(t, dir, map[string]string{"a": "123"})
			if err := make(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := Pack(t.Context(), &bytes.Buffer{}, dir, Limits{Entries: 2, Bytes: 10}); err == nil {
				t.Error("packed")
			} else if !strings.Contains(err.Error(), "l") {
				t.Errorf("the error does not name it: %v", err)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	fill(t, dir, map[string]string{"a": ""})
	if _, err := Pack(ctx, &bytes.Buffer{}, dir, Limits{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestUnpackRefuses(t *testing.T) {
	file := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name, Size: 4} }
	link := func(name, to string) tar.Header {
		return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
	}
	dir := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755} }
	for name, headers := range map[string][]tar.Header{
		"traversal":            {file("../x")},
		"traversal inside":     {file("a/../../x")},
		"not clean":            {file("a//b")},
		"dot":                  {dir("./")},
		"absolute":             {file("/x")},
		"empty":                {file("")},
		"twice":                {file("a"), file("a")},
		"out of order":         {file("b"), file("a")},
		"folder twice":         {dir("a/"), dir("a/")},
		"link out":             {link("a", "../secret")},
		"link out, deeper":     {dir("a/"), link("a/b", "../../secret")},
		"absolute link":        {link("a", "/etc/passwd")},
		"link by link":         {link("a", "."), link("b", "a/../../secret")},
		"empty link":           {link("a", "")},
		"through a link":       {link("a", "."), file("a/x")},
		"through a file":       {file("a"), file("a/x")},
		"hard link":            {file("a"), {Typeflag: tar.TypeLink, Name: "b", Linkname: "a"}},
		"hard link out":        {{Typeflag: tar.TypeLink, Name: "b", Linkname: "../secret"}},
		"device":               {{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3}},
		"block device":         {{Typeflag: tar.TypeBlock, Name: "sda", Devmajor: 8}},
		"pipe":                 {{Typeflag: tar.TypeFifo, Name: "p"}},
		"many":                 {dir("a/"), dir("b/"), dir("c/"), dir("d/"), dir("e/"), dir("f/"), dir("g/")},
		"many, without entry":  {file("a/b/c/d/e/f/g")},
		"large":                {file("a"), file("b"), file("c"), file("d")},
		"long":                 {file(strings.Repeat("a/", 3000) + "b")},
		"deep":                 {file(strings.Repeat("a/", maxDepth+1) + "b")},
		"one name is too long": {file(strings.Repeat("a", 300))},
	} {
		t.Run(name, func(t *testing.T) {
			outer := t.TempDir()
			fill(t, outer, map[string]string{"secret": "good"})
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			for _, h := range headers {
				h.Mode |= 0o777
				h.Format = tar.FormatPAX
				if h.Name == "" {
					h.Format = tar.FormatUSTAR
				}
				if err := w.WriteHeader(&h); err != nil {
					t.Fatal(err)
				}
				if h.Size > 0 {
					if _, err := w.Write([]byte("evil")); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(b.Bytes())
			err := unpack(t.Context(), &b, digestOf(sum[:]), filepath.Join(outer, "box"), Limits{Entries: 6, Bytes: 12})
			if err == nil {
				t.Error("unpacked")
			}
			if got := list(t, outer); got != "secret -rw-r--r-- \"good\"\n" {
				t.Errorf("it left\n%s", got)
			}
		})
	}
}

func TestUnpackVerifies(t *testing.T) {
	src := t.TempDir()
	fill(t, src, map[string]string{"a": "text", "d/e": "more"})
	archive, digest := pack(t, src)
	changed := bytes.Replace(archive, []byte("text"), []byte("Text"), 1)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		data []byte
		want Digest
	}{
		"changed":      {t.Context(), changed, digest},
		"another":      {t.Context(), archive, "sha256:00"},
		"no name":      {t.Context(), archive, ""},
		"cut":          {t.Context(), archive[:700], digest},
		"cut at entry": {t.Context(), archive[:1024], digest},
		"longer":       {t.Context(), append(bytes.Clone(archive), 1), digest},
		"much longer":  {t.Context(), append(bytes.Clone(archive), make([]byte, 2<<20)...), digest},
		"cancelled":    {cancelled, archive, digest},
	} {
		dst := filepath.Join(t.TempDir(), "out")
		if err := unpack(c.ctx, bytes.NewReader(c.data), c.want, dst, Limits{}); err == nil {
			t.Errorf("%s: it was unpacked", name)
		}
		if _, err := os.Lstat(dst); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: it left something: %v", name, err)
		}
	}
	// An existing folder stays unchanged.
	if err := unpack(t.Context(), bytes.NewReader(archive), digest, src, Limits{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("into an existing folder: %v", err)
	}
	if _, again := pack(t, src); again != digest {
		t.Error("an existing folder changed")
	}
}

// FuzzUnpack checks that no archive changes anything outside the folder, that unpacked
// files pack to the same files, and that no link leads outside.
func FuzzUnpack(f *testing.F) {
	for _, s := range []string{
		"f a\nf b/c\n", "d a\nl a/b ../c\nf c\n", "l a ..\n", "l a .\nl b a/..\n", "f ../x\n", "d a\nd a/b\nl a/b/c ../../d/e\nd d\n", "l a b\nl b a\n", "h a b\n", "f a\nf a\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for line := range bytes.Lines(in) {
			p := bytes.Fields(line)
			if len(p) < 2 {
				continue
			}
			h := &tar.Header{Typeflag: tar.TypeReg, Name: string(p[1]), Mode: 0o777}
			if len(p) > 2 {
				h.Linkname = string(p[2])
			}
			switch p[0][0] {
			case 'd':
				h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
			case 'l':
				h.Typeflag = tar.TypeSymlink
			case 'h':
				h.Typeflag = tar.TypeLink
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
		outer := t.TempDir()
		fill(t, outer, map[string]string{"secret": "good"})
		box := filepath.Join(outer, "box")
		for _, archive := range [][]byte{b.Bytes(), in} {
			sum := sha256.Sum256(archive)
			err := unpack(t.Context(), bytes.NewReader(archive), digestOf(sum[:]), box, Limits{Entries: 100, Bytes: 1 << 16})
			if err == nil {
				confined(t, box)
				before := list(t, box)
				if _, err := Pack(t.Context(), &bytes.Buffer{}, box, Limits{}); err != nil {
					t.Fatalf("what was unpacked cannot be packed: %v\n%s", err, before)
				}
				if err := removeAll(box); err != nil {
					t.Fatal(err)
				}
			}
			if got := list(t, outer); got != "secret -rw-r--r-- \"good\"\n" {
				t.Fatalf("it left\n%s", got)
			}
		}
	})
}

// confined checks that no link of a folder leads outside.
func confined(t *testing.T, dir string) {
	t.Helper()
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type()&fs.ModeSymlink != 0 {
			if to, err := filepath.EvalSymlinks(p); err == nil && to != dir && !strings.HasPrefix(to, dir+"/") {
				t.Fatalf("%s leads to %s", p, to)
			}
		}
		return nil
	})
}

// TestReadIsLinear checks that twice as many entries take twice as long.
func TestReadIsLinear(t *testing.T) {
	linear.Check(t, "archive of a folder", 2000, func(n int) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for i := range n {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%08d/a", i), Mode: 0o644, Format: tar.FormatPAX}); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(b.Bytes())
		if err := Read(t.Context(), &b, digestOf(sum[:]), Limits{}, func(*tar.Header, io.Reader) error { return nil }); err != nil {
			t.Fatal(err)
		}
	})
}
