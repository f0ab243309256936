package client

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/linear"
)

// archive returns a tar archive as a guest might send it. Each file contains its own
// name.
func archive(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		h.Mode |= 0o4722 // the client must drop special bits and write access for others
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(h.Name))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte(h.Name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func file(name string) tar.Header   { return tar.Header{Name: name, Typeflag: tar.TypeReg} }
func folder(name string) tar.Header { return tar.Header{Name: name + "/", Typeflag: tar.TypeDir} }
func symlink(name, to string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}
}

// tree lists a folder: files with their content, links with their targets.
func tree(t testing.TB, dir string) string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if info, err := d.Info(); err == nil && d.Type()&fs.ModeSymlink == 0 && info.Mode().Perm()&0o022 != 0 {
			rel += " which others can write"
		}
		switch {
		case d.IsDir():
			rel += "/"
		case d.Type()&fs.ModeSymlink != 0:
			to, _ := os.Readlink(p)
			rel += "->" + to
		default:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			rel += "=" + string(b)
			if info, _ := d.Info(); info.Mode()&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky) != 0 {
				rel += " with a special mode"
			}
		}
		all = append(all, rel)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, " ")
}

func TestReceive(t *testing.T) {
	for _, c := range []struct {
		name    string
		sent    []tar.Header
		o       ReceiveOptions
		want    string // the folder's content; before, "old" is a file and "there" a folder with a file
		target  string // "new" by default
		refused string
		skipped string
	}{
		{name: "a file", sent: []tar.Header{file("x")}, want: "new=x"},
		{name: "a file over one that is there", sent: []tar.Header{file("x")}, target: "old", want: "old=x"},
		{name: "a folder", sent: []tar.Header{folder("d"), folder("d/e"), file("d/e/f"), symlink("d/e/l", "../g"), file("d/g")}, want: "new/ new/e/ new/e/f=d/e/f new/e/l->../g new/g=d/g"},
		{name: "a folder over a file", sent: []tar.Header{folder("d")}, target: "old", refused: "is not a folder"},
		{name: "a file over a folder", sent: []tar.Header{file("d")}, target: "there", refused: "is a folder"},
		{name: "a folder over a folder", sent: []tar.Header{folder("d"), file("d/f")}, target: "there", refused: "exists"},
		{name: "a folder merged", sent: []tar.Header{folder("d"), file("d/f"), file("d/n")}, target: "there", o: ReceiveOptions{Merge: true}, want: "there/f=d/f there/n=d/n"},
		{name: "nothing", refused: "sent nothing"},
		{name: "two top entries", sent: []tar.Header{file("x"), file(".bashrc")}, refused: "second top entry"},
		{name: "another folder besides", sent: []tar.Header{folder("d"), folder(".ssh"), file(".ssh/k")}, refused: "second top entry"},
		{name: "dots", sent: []tar.Header{folder("d"), file("d/../../x")}, refused: "leads outside"},
		{name: "an absolute name", sent: []tar.Header{file("/x")}, refused: "leads outside"},
		{name: "the same file twice", sent: []tar.Header{folder("d"), file("d/f"), file("d/f")}, refused: "file exists"},
		{name: "below a file", sent: []tar.Header{file("d"), file("d/f")}, refused: "not a folder"},
		{name: "through a link", sent: []tar.Header{folder("d"), symlink("d/l", "e"), folder("d/e"), file("d/l/f")}, refused: "no such file"},
		{name: "through a link to the outside", sent: []tar.Header{folder("d"), symlink("d/l", ".."), file("d/l/old")}, refused: "no such file"},
		{name: "a link through a link", sent: []tar.Header{folder("d"), symlink("d/p", "."), symlink("d/p/p/out", "../..")}, refused: "no such file"},
		{name: "a link written outside", sent: []tar.Header{folder("d"), symlink("d/out", ".."), symlink("d/out/.profile", "there/f")}, o: ReceiveOptions{Links: true}, refused: "no such file"},
		{name: "a link below a file", sent: []tar.Header{folder("d"), file("d/f"), symlink("d/f/l", "g")}, refused: "not a directory"},
		{name: "a long link", sent: []tar.Header{folder("d"), symlink("d/l", strings.Repeat("x", 5000))}, want: "new/", skipped: "too long"},
		{name: "a link in the place of a file", sent: []tar.Header{folder("d"), symlink("d/l", "f"), file("d/l")}, want: "new/ new/l=d/l", skipped: "twice"},
		{name: "a link to the outside", sent: []tar.Header{folder("d"), symlink("d/l", "../old"), symlink("d/m", "/etc/passwd"), symlink("d/n", "x/../../old")}, want: "new/", skipped: "outside"},
		{name: "a link to the outside, asked for", sent: []tar.Header{folder("d"), symlink("d/l", "../old")}, o: ReceiveOptions{Links: true}, want: "new/ new/l->../old"},
		{name: "a link alone", sent: []tar.Header{symlink("l", "old")}, want: "", skipped: "outside"},
		{name: "a device", sent: []tar.Header{folder("d"), {Name: "d/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}}, want: "new/", skipped: "neither"},
		{name: "a hard link", sent: []tar.Header{folder("d"), {Name: "d/h", Typeflag: tar.TypeLink, Linkname: "old"}}, want: "new/", skipped: "neither"},
		{name: "too many bytes", sent: []tar.Header{folder("d"), file("d/123"), file("d/456")}, o: ReceiveOptions{MaxBytes: 9}, refused: "more than 9 bytes"},
		{name: "too many entries", sent: []tar.Header{folder("d"), file("d/1"), file("d/2")}, o: ReceiveOptions{MaxEntries: 2}, refused: "more than 2 entries"},
		{name: "too many bytes of names", sent: []tar.Header{folder("d"), file("d/123"), file("d/456")}, o: ReceiveOptions{MaxNameBytes: 10}, refused: "more than 10 bytes"},
		{name: "too many bytes of links", sent: []tar.Header{folder("d"), symlink("d/l", strings.Repeat("/x", 20))}, o: ReceiveOptions{MaxNameBytes: 40}, refused: "more than 40 bytes"},
		{name: "a long name", sent: []tar.Header{folder("d"), {Name: "d/" + strings.Repeat("y/", 3000) + "dev", Typeflag: tar.TypeChar}}, refused: "name has more than"},
		{name: "no name of its own", sent: []tar.Header{file("x")}, target: "..", refused: "is a folder"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range map[string]string{"old": "old", "there/f": "old"} {
				if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			before := tree(t, dir)
			target := c.target
			if target == "" {
				target = "new"
			}
			var skipped strings.Builder
			c.o.Skipped = func(_, why string) { skipped.WriteString(why) }
			err := receiveArchive(bytes.NewReader(archive(t, c.sent...)), dir+"/"+target, c.o)
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Errorf("the error is %v, want %q", err, c.refused)
				}
				if after := tree(t, dir); after != before {
					t.Errorf("it failed, but left %s", after)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if (c.skipped == "") != (skipped.Len() == 0) || !strings.Contains(skipped.String(), c.skipped) {
				t.Errorf("skipped: %q, want %q", skipped.String(), c.skipped)
			}
			want := map[string]string{"": "old=old there/ there/f=old", "old": "there/ there/f=old", "there": "old=old there/"}[c.target]
			got := tree(t, dir)
			for _, part := range append(strings.Fields(want), strings.Fields(c.want)...) {
				got = strings.Replace(" "+got+" ", " "+part+" ", " ", 1)
			}
			if strings.TrimSpace(got) != "" {
				t.Errorf("the folder has more than wanted, or something else: %s", got)
			}
			if n := len(strings.Fields(tree(t, dir))); n != len(strings.Fields(want))+len(strings.Fields(c.want)) {
				t.Errorf("the folder has %s", tree(t, dir))
			}
		})
	}
}

// TestReceiveBreaksOff checks that the old file stays until the new one is complete.
func TestReceiveBreaksOff(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "old"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	whole := archive(t, tar.Header{Name: strings.Repeat("x", 90), Typeflag: tar.TypeReg})
	if err := receiveArchive(bytes.NewReader(whole[:540]), filepath.Join(dir, "old"), ReceiveOptions{}); err == nil {
		t.Error("a truncated archive was accepted")
	}
	if got := tree(t, dir); got != "old=old" {
		t.Errorf("the folder has %s", got)
	}
}

// TestReceiveCountsWithoutOverflow has a file so long that the sum of its length and the
// bytes before it overflows.
func TestReceiveCountsWithoutOverflow(t *testing.T) {
	whole := bytes.NewBuffer(archive(t, folder("d"), file("d/f")))
	whole.Truncate(whole.Len() - 1024) // without the archive's end
	if err := tar.NewWriter(whole).WriteHeader(&tar.Header{Name: "d/g", Typeflag: tar.TypeReg, Size: math.MaxInt64}); err != nil {
		t.Fatal(err)
	}
	err := receiveArchive(whole, filepath.Join(t.TempDir(), "new"), ReceiveOptions{})
	if err == nil || !strings.Contains(err.Error(), "bytes") {
		t.Errorf("the error is %v", err)
	}
}

// FuzzReceive accepts any archive: nothing but the target may change, and no link in it
// may lead outside.
func FuzzReceive(f *testing.F) {
	f.Add(archive(f, folder("d"), symlink("d/l", ".."), file("d/l/x")))
	f.Add(archive(f, folder("d"), symlink("d/l", "../../x"), file("d/l")))
	f.Add(archive(f, file("../x")))
	f.Add(archive(f, folder("d"), symlink("d/p", "."), symlink("d/p/p/out", "../.."), symlink("d/out/x", "y")))
	f.Add(archive(f, folder("d"), folder("d/e"), symlink("d/e/l", "../f"), file("d/f")))
	f.Fuzz(func(t *testing.T, b []byte) {
		outer := t.TempDir()
		inner := filepath.Join(outer, "in")
		if err := os.Mkdir(inner, 0o700); err != nil {
			t.Fatal(err)
		}
		_ = receiveArchive(bytes.NewReader(b), filepath.Join(inner, "copy"), ReceiveOptions{MaxBytes: 1 << 20})
		if left, err := os.ReadDir(outer); err != nil || len(left) != 1 {
			t.Errorf("outside of the folder: %v, %v", left, err)
		}
		left, err := os.ReadDir(inner)
		if err != nil || len(left) > 1 || len(left) == 1 && left[0].Name() != "copy" {
			t.Errorf("beside the target: %v, %v", left, err)
		}
		_ = filepath.WalkDir(inner, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.Type()&fs.ModeSymlink != 0 {
				if to, err := filepath.EvalSymlinks(p); err == nil && !strings.HasPrefix(to, filepath.Join(inner, "copy")) {
					t.Errorf("%s leads to %s", p, to)
				}
			}
			return nil
		})
	})
}

// TestReceiveIsLinear checks that twice as many entries take twice as long.
func TestReceiveIsLinear(t *testing.T) {
	linear.Check(t, "receive", 500, func(n int) {
		sent := []tar.Header{folder("d")}
		for i := range n {
			sent = append(sent, folder(fmt.Sprint("d/", i)), symlink(fmt.Sprint("d/l", i), "x"))
		}
		if err := receiveArchive(bytes.NewReader(archive(t, sent...)), filepath.Join(t.TempDir(), "new"), ReceiveOptions{Skipped: func(string, string) {}}); err != nil {
			t.Fatal(err)
		}
	})
}
