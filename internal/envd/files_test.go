package envd

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

func at(path string, more ...string) string {
	q := url.Values{"path": {path}}
	for i := 0; i < len(more); i += 2 {
		q.Set(more[i], more[i+1])
	}
	return "?" + q.Encode()
}

func (g *guest) file(name, text string, mode os.FileMode) string {
	g.t.Helper()
	path := filepath.Join(g.dir, name)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		g.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		g.t.Fatal(err)
	}
	return path
}

func owner(t *testing.T, path string) (uid, gid uint32, mode os.FileMode) {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	return st.Uid, st.Gid, info.Mode()
}

func gunzip(t *testing.T, s string) string {
	t.Helper()
	z, err := gzip.NewReader(strings.NewReader(s))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestDownload(t *testing.T) {
	g := boot(t)
	text := strings.Repeat("0123456789", 1000)
	file := g.file("f", text, 0o644)
	secret := g.file("secret", "s", 0o600)
	if err := unix.Mkfifo(g.dir+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("f", g.dir+"/link"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		want int
	}{
		{file, 200},
		{g.dir + "/link", 200},
		{g.dir + "/../" + filepath.Base(g.dir) + "/f", 200},
		{secret, 403},
		{"/etc/shadow", 403},
		{"/proc/self/environ", 403},
		{g.dir, 400},
		{g.dir + "/fifo", 400},
		{"/dev/zero", 400},
		{g.dir + "/none", 404},
		{file + "/x", 400},
		{"/\x00", 400},
		{"/" + strings.Repeat("x", 300), 400},
		{"", 400},
	} {
		a := g.do("GET", "/files"+at(c.path), testToken, nil, nil)
		if a.code != c.want {
			t.Errorf("%q answers %d %s, not %d", c.path, a.code, a.body, c.want)
		}
		if a.code != 200 {
			var e struct{ Code, Message string }
			if json.Unmarshal([]byte(a.body), &e) != nil || e.Code == "" || e.Message == "" {
				t.Errorf("%q answers %s", c.path, a.body)
			}
		}
	}
	a := g.do("GET", "/files"+at(file), testToken, nil, nil)
	if a.body != text || a.header.Get("Content-Type") != "application/octet-stream" || a.header.Get("Content-Length") != "10000" {
		t.Errorf("%d bytes, %v", len(a.body), a.header)
	}
	if a := g.do("GET", "/files"+at(secret, "username", "root"), testToken, nil, nil); a.body != "s" {
		t.Errorf("root gets %d %s", a.code, a.body)
	}
	if a := g.do("GET", "/files"+at(secret), testToken, nil, map[string]string{"Authorization": "Basic cm9vdDo="}); a.body != "s" {
		t.Errorf("root gets %d %s", a.code, a.body)
	}
	if a := g.do("GET", "/files"+at(file, "username", "nosuchuser"), testToken, nil, nil); a.code != 400 || !strings.Contains(a.body, `no user or group \"nosuchuser\"`) {
		t.Errorf("an unknown user gets %d %s", a.code, a.body)
	}
	for r, want := range map[string]string{"bytes=0-9": text[:10], "bytes=9990-": text[9990:], "bytes=-3": "789", "bytes=5-5": "5"} {
		if a := g.do("GET", "/files"+at(file), testToken, nil, map[string]string{"Range": r, "Accept-Encoding": "gzip"}); a.code != 206 || a.body != want || a.header.Get("Content-Encoding") != "" {
			t.Errorf("%s gets %d %q", r, a.code, a.body)
		}
	}
	if a := g.do("GET", "/files"+at(file), testToken, nil, map[string]string{"Range": "bytes=10001-"}); a.code != 416 {
		t.Errorf("a range behind the end gets %d", a.code)
	}
	if a := g.do("HEAD", "/files"+at(file), testToken, nil, nil); a.code != 200 || a.header.Get("Content-Length") != "10000" || a.body != "" {
		t.Errorf("HEAD gets %d, %v", a.code, a.header)
	}
	for enc, want := range map[string]string{
		"": "", "gzip": "gzip", "gzip, deflate, br": "gzip", "GZIP;q=0.5": "gzip", "gzip;q=0": "", "identity": "", "identity;q=1, gzip;q=0.5": "",
		"*": "", "br": "", "identity;q=0, gzip": "gzip", "*;q=0, gzip;q=0.1": "gzip", "identity;q=0, *": "gzip",
		"identity;q=0": "406", "*;q=0": "406", "identity;q=0, gzip;q=0": "406", "identity;q=0, br": "406",
	} {
		a := g.do("GET", "/files"+at(file), testToken, nil, map[string]string{"Accept-Encoding": enc})
		if want == "406" {
			if a.code != 406 {
				t.Errorf("Accept-Encoding %q gets %d", enc, a.code)
			}
			continue
		}
		body := a.body
		if want == "gzip" {
			z, err := gzip.NewReader(strings.NewReader(a.body))
			if err != nil {
				t.Errorf("Accept-Encoding %q: %v", enc, err)
				continue
			}
			b, _ := io.ReadAll(z)
			body = string(b)
		}
		if a.header.Get("Content-Encoding") != want || body != text {
			t.Errorf("Accept-Encoding %q gets %v, %d bytes", enc, a.header, len(body))
		}
	}
	g.file("empty", "", 0o644)
	if a := g.do("GET", "/files"+at(g.dir+"/empty"), testToken, nil, nil); a.code != 200 || a.body != "" {
		t.Errorf("an empty file is %d %q", a.code, a.body)
	}
	// For its own files, the kernel reports a size of 0 or of a page.
	for path, want := range map[string]string{"/sys/class/net/lo/address": "00:00:00:00:00:00\n", "/proc/sys/kernel/ostype": "Linux\n"} {
		length := strconv.Itoa(len(want))
		for _, method := range []string{"GET", "HEAD"} {
			if a := g.do(method, "/files"+at(path), testToken, nil, nil); a.code != 200 || a.header.Get("Content-Length") != length || method == "GET" && a.body != want {
				t.Errorf("%s %s: %d %q, %v", method, path, a.code, a.body, a.header)
			}
		}
		if a := g.do("GET", "/files"+at(path), testToken, nil, map[string]string{"Range": "bytes=1-2"}); a.code != 206 || a.body != want[1:3] {
			t.Errorf("a part of %s: %d %q", path, a.code, a.body)
		}
		if a := g.do("GET", "/files"+at(path), testToken, nil, map[string]string{"Accept-Encoding": "gzip"}); a.code != 200 || gunzip(t, a.body) != want {
			t.Errorf("%s compressed: %d %q", path, a.code, a.body)
		}
		a := g.do("GET", "/archive"+at(path), testToken, nil, nil)
		r := tar.NewReader(strings.NewReader(a.body))
		h, err := r.Next()
		if err != nil || h.Size != int64(len(want)) {
			t.Errorf("an archive of %s: %v, %v", path, h, err)
			continue
		}
		if b, err := io.ReadAll(r); err != nil || string(b) != want {
			t.Errorf("an archive of %s: %q, %v", path, b, err)
		}
	}
	large := g.file("large", strings.Repeat("0123456789abcdef", 1<<14), 0o644)
	if a := g.do("GET", "/files"+at(large), testToken, nil, nil); a.code != 200 || len(a.body) != 1<<18 || a.header.Get("Accept-Ranges") != "bytes" {
		t.Errorf("a large file: %d, %d bytes, %v", a.code, len(a.body), a.header)
	}
	if a := g.do("HEAD", "/files"+at(large), testToken, nil, nil); a.code != 200 || a.header.Get("Content-Length") != "262144" {
		t.Errorf("HEAD of a large file: %d, %v", a.code, a.header)
	}
	if a := g.do("GET", "/files"+at(large), testToken, nil, map[string]string{"Range": "bytes=-2"}); a.code != 206 || a.body != "ef" {
		t.Errorf("the end of a large file: %d %q", a.code, a.body)
	}
	if a := g.do("GET", "/files"+at(large), testToken, nil, map[string]string{"If-Modified-Since": time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)}); a.code != 304 {
		t.Errorf("a large file that did not change: %d", a.code)
	}
	if a := g.do("GET", "/files"+at("/proc/version"), testToken, nil, nil); a.code != 200 || !strings.Contains(a.body, "Linux") {
		t.Errorf("/proc/version is %d %q", a.code, a.body)
	}
}

func TestUpload(t *testing.T) {
	g := boot(t)
	put := func(path, body string, want int, more ...string) answer {
		t.Helper()
		a := g.do("POST", "/files"+at(path, more...), testToken, strings.NewReader(body), map[string]string{"Content-Type": "application/octet-stream"})
		if a.code != want {
			t.Errorf("upload to %q answers %d %s, not %d", path, a.code, a.body, want)
		}
		return a
	}
	a := put(g.dir+"/a/b/c.txt", "text", 200)
	if got := strings.TrimSpace(a.body); got != fmt.Sprintf(`[{"path":"%s/a/b/c.txt","name":"c.txt","type":"file"}]`, g.dir) {
		t.Errorf("answer is %s", got)
	}
	for path, want := range map[string]os.FileMode{"/a": 0o755 | os.ModeDir, "/a/b": 0o755 | os.ModeDir, "/a/b/c.txt": 0o644} {
		if uid, gid, mode := owner(t, g.dir+path); uid != g.nobody.UID || gid != g.nobody.GID || mode != want {
			t.Errorf("%s is %d:%d %v", path, uid, gid, mode)
		}
	}
	if a := g.do("GET", "/files"+at(g.dir+"/a/b/c.txt"), testToken, nil, nil); a.body != "text" {
		t.Errorf("read back %q", a.body)
	}

	// Overwriting a file keeps its mode and its owner, whoever writes.
	path := g.file("mine", "old and longer", 0o750)
	_ = os.Chown(path, int(g.nobody.UID), int(g.nobody.GID))
	put(path, "new", 200)
	if uid, _, mode := owner(t, path); uid != g.nobody.UID || mode != 0o750 {
		t.Errorf("%d %v", uid, mode)
	}
	put(path, "by root", 200, "username", "root")
	if uid, _, mode := owner(t, path); uid != g.nobody.UID || mode != 0o750 {
		t.Errorf("after root: %d %v", uid, mode)
	}
	shared := g.file("shared", "old and longer", 0o666) // owned by root, writable for everybody
	put(shared, "new", 200)
	if uid, _, mode := owner(t, shared); uid != 0 || mode != 0o666 {
		t.Errorf("shared: %d %v", uid, mode)
	}
	if b, _ := os.ReadFile(shared); string(b) != "new" {
		t.Errorf("shared has %q", b)
	}
	// A file in a read-only folder can still be overwritten.
	if err := os.Mkdir(g.dir+"/fixed", 0o755); err != nil {
		t.Fatal(err)
	}
	fixed := g.file("fixed/f", "old", 0o666)
	put(fixed, "new", 200)
	put(g.dir+"/fixed/other", "new", 403)
	put(g.file("roots", "s", 0o644), "x", 403)
	put("/etc/wrenn-test", "x", 403)
	put(g.dir, "x", 400)
	put(path+"/below", "x", 400)
	put("/\x00", "x", 400)
	put("", "x", 400)
	if err := unix.Mkfifo(g.dir+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	put(g.dir+"/fifo", "x", 400)
	put("/dev/null", "x", 400)
	put(g.dir+"/empty", "", 200)

	// Uploads follow symbolic links, to existing and to new files.
	for link, to := range map[string]string{"l1": "mine", "l2": g.dir + "/fresh", "l3": "l2", "loop": "loop"} {
		if err := os.Symlink(to, g.dir+"/"+link); err != nil {
			t.Fatal(err)
		}
	}
	put(g.dir+"/l1", "through", 200)
	if b, _ := os.ReadFile(path); string(b) != "through" {
		t.Errorf("behind the link is %q", b)
	}
	put(g.dir+"/l3", "far", 200)
	if b, _ := os.ReadFile(g.dir + "/fresh"); string(b) != "far" {
		t.Errorf("behind the links is %q", b)
	}
	put(g.dir+"/loop", "x", 400)
	if _, _, mode := owner(t, g.dir+"/l1"); mode&os.ModeSymlink == 0 {
		t.Error("the link was replaced")
	}
	g.noTemps()
}

// noTemps checks that uploads left no temporary files.
func (g *guest) noTemps() {
	g.t.Helper()
	left := func() (l []string) {
		_ = filepath.WalkDir(g.dir, func(p string, _ os.DirEntry, _ error) error {
			if strings.Contains(p, ".wrenn-") && p != g.dir {
				l = append(l, p)
			}
			return nil
		})
		return l
	}
	await.Until(g.t, "the temporary files disappear", func() bool { return len(left()) == 0 })
}

func TestUploadMultipart(t *testing.T) {
	g := boot(t)
	type part struct{ field, file, text string }
	post := func(query string, want int, parts ...part) answer {
		t.Helper()
		var b bytes.Buffer
		m := multipart.NewWriter(&b)
		for _, p := range parts {
			w, err := m.CreateFormFile(p.field, p.file)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(w, p.text)
		}
		m.Close()
		a := g.do("POST", "/files"+query, testToken, &b, map[string]string{"Content-Type": m.FormDataContentType()})
		if a.code != want {
			t.Errorf("%s %v answers %d %s, not %d", query, parts, a.code, a.body, want)
		}
		return a
	}
	a := post("", 200, part{"file", g.dir + "/x/1", "one"}, part{"other", "ignored", "x"}, part{"file", g.dir + "/x/2", "two"})
	if !strings.Contains(a.body, g.dir+"/x/1") || !strings.Contains(a.body, `"name":"2"`) {
		t.Errorf("answer is %s", a.body)
	}
	post(at(g.dir+"/3"), 200, part{"file", "whatever", "three"})
	for name, want := range map[string]string{"x/1": "one", "x/2": "two", "3": "three"} {
		if b, _ := os.ReadFile(g.dir + "/" + name); string(b) != want {
			t.Errorf("%s has %q", name, b)
		}
	}
	post(at(g.dir+"/4"), 400, part{"file", "a", ""}, part{"file", "b", ""})
	post("", 400)
	post("", 400, part{"file", "", "x"})
	post("", 400, part{"other", "x", "x"})
	for _, ct := range []string{"multipart/form-data", "multipart/form-data; boundary=x"} {
		if a := g.do("POST", "/files"+at(g.dir+"/5"), testToken, strings.NewReader("--x\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nabc"), map[string]string{"Content-Type": ct}); a.code != 400 {
			t.Errorf("%s answers %d %s", ct, a.code, a.body)
		}
	}
	if _, err := os.Stat(g.dir + "/5"); err == nil {
		t.Error("a broken upload left a file")
	}
	g.noTemps()
}

func TestUploadGzip(t *testing.T) {
	g := boot(t)
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = io.WriteString(z, "text")
	z.Close()
	h := map[string]string{"Content-Encoding": "gzip"}
	if a := g.do("POST", "/files"+at(g.dir+"/f"), testToken, bytes.NewReader(b.Bytes()), h); a.code != 200 {
		t.Errorf("%d %s", a.code, a.body)
	}
	if f, _ := os.ReadFile(g.dir + "/f"); string(f) != "text" {
		t.Errorf("the file has %q", f)
	}
	for _, bad := range []string{"", "x", b.String()[:b.Len()-5], b.String() + "trailing"} {
		if a := g.do("POST", "/files"+at(g.dir+"/f"), testToken, strings.NewReader(bad), h); a.code != 400 {
			t.Errorf("%q answers %d %s", bad, a.code, a.body)
		}
	}
	h["Content-Encoding"] = "br"
	if a := g.do("POST", "/files"+at(g.dir+"/f"), testToken, strings.NewReader("x"), h); a.code != 400 {
		t.Errorf("br answers %d", a.code)
	}
	if f, _ := os.ReadFile(g.dir + "/f"); string(f) != "text" {
		t.Errorf("a broken upload changed the file to %q", f)
	}
	g.noTemps()
}

// TestUploadBroken checks that an upload that breaks off leaves the old file.
func TestUploadBroken(t *testing.T) {
	g := boot(t)
	path := g.file("f", "old", 0o666)
	_ = os.Chown(path, int(g.nobody.UID), int(g.nobody.GID))
	for _, target := range []string{path, g.dir + "/fresh"} {
		c, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(c, "POST /files%s HTTP/1.1\r\nHost: x\r\n%s: %s\r\nContent-Length: 1000000\r\n\r\nhalf", at(target), hostwire.AccessToken, testToken)
		await.Until(t, "temporary file", func() bool {
			m, _ := filepath.Glob(g.dir + "/.wrenn-upload-*")
			return len(m) == 1
		})
		c.Close()
		g.noTemps()
	}
	if b, _ := os.ReadFile(path); string(b) != "old" {
		t.Errorf("the file has %q", b)
	}
	if _, err := os.Stat(g.dir + "/fresh"); err == nil {
		t.Error("a truncated file exists")
	}
}

func TestUploadFull(t *testing.T) {
	g := boot(t)
	disk := g.dir + "/disk"
	if err := os.Mkdir(disk, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=1m,mode=777"); err != nil {
		t.Skip("needs to mount a tmpfs: ", err)
	}
	defer unix.Unmount(disk, unix.MNT_DETACH)
	big := make([]byte, 4<<20)
	// With a known length it fails early; otherwise, when the disk is full.
	for _, body := range []io.Reader{bytes.NewReader(big), struct{ io.Reader }{bytes.NewReader(big)}} {
		if a := g.do("POST", "/files"+at(disk+"/big"), testToken, body, nil); a.code != 507 {
			t.Errorf("%d %s", a.code, a.body)
		}
	}
	if a := g.do("POST", "/files"+at(disk+"/small"), testToken, bytes.NewReader(big[:1000]), nil); a.code != 200 {
		t.Errorf("after a full disk: %d %s", a.code, a.body)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	_ = w.WriteHeader(&tar.Header{Name: "big", Typeflag: tar.TypeReg, Size: int64(len(big)), Mode: 0o644})
	_, _ = w.Write(big)
	w.Close()
	if a := g.do("POST", "/archive"+at(disk), testToken, &b, nil); a.code != 507 {
		t.Errorf("archive: %d %s", a.code, a.body)
	}
	if e, _ := os.ReadDir(disk); len(e) != 1 {
		t.Errorf("left are %v", e)
	}
}

// TestFilesMemory checks that files of any size pass in constant memory, in both
// directions and with both protocols.
func TestFilesMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("moves a gigabyte")
	}
	g := boot(t)
	const size = 256 << 20
	var before, after runtime.MemStats
	block := make([]byte, 1<<20)
	_, _ = rand.Read(block)
	runtime.GC()
	runtime.ReadMemStats(&before)
	for name, client := range map[string]*http.Client{"h1": g.plain, "h2": g.client} {
		req, _ := http.NewRequestWithContext(t.Context(), "POST", g.url+"/files"+at(g.dir+"/"+name), io.LimitReader(&repeat{block: block}, size))
		req.Header.Set(hostwire.AccessToken, testToken)
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != 200 {
			t.Fatalf("%s: %s", name, res.Status)
		}
		req, _ = http.NewRequestWithContext(t.Context(), "GET", g.url+"/files"+at(g.dir+"/"+name), nil)
		req.Header.Set(hostwire.AccessToken, testToken)
		req.Header.Set("Accept-Encoding", "identity")
		if res, err = client.Do(req); err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, res.Body)
		res.Body.Close()
		if n != size || err != nil {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
	}
	runtime.ReadMemStats(&after)
	if used := int64(after.Sys) - int64(before.Sys); used > 64<<20 {
		t.Errorf("%d MiB more memory", used>>20)
	}
}

type repeat struct {
	block []byte
	off   int
}

func (r *repeat) Read(p []byte) (int, error) {
	n := copy(p, r.block[r.off:])
	r.off = (r.off + n) % len(r.block)
	return n, nil
}

func TestArchive(t *testing.T) {
	g := boot(t)
	when := time.Unix(1_500_000_000, 123456000)
	for _, d := range []string{"tree", "tree/empty", "tree/sub"} {
		if err := os.Mkdir(g.dir+"/"+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	g.file("tree/a", "aaa", 0o640)
	_ = os.Chown(g.dir+"/tree/a", int(g.nobody.UID), 0)
	g.file("tree/sub/run", "#!/bin/sh\n", 0o755)
	g.file("tree/sub/empty", "", 0o600)
	_ = os.Chown(g.dir+"/tree/sub/empty", int(g.nobody.UID), 0)
	long := strings.Repeat("ü", 100)
	g.file("tree/"+long, "long", 0o644)
	_ = os.Symlink("sub/run", g.dir+"/tree/link")
	_ = os.Symlink("/nowhere/at/all", g.dir+"/tree/dangling")
	if err := unix.Mkfifo(g.dir+"/tree/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	_ = os.Chmod(g.dir+"/tree/empty", 0o700)
	_ = os.Chown(g.dir+"/tree/empty", int(g.nobody.UID), 0)
	for _, p := range []string{"tree/a", "tree/empty", "tree/sub", "tree"} {
		if err := os.Chtimes(g.dir+"/"+p, when, when); err != nil {
			t.Fatal(err)
		}
	}
	a := g.do("GET", "/archive"+at(g.dir+"/tree"), testToken, nil, nil)
	if a.code != 200 || a.header.Get("Content-Type") != "application/x-tar" {
		t.Fatalf("%d %s", a.code, a.body)
	}
	var names []string
	for r := tar.NewReader(strings.NewReader(a.body)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	want := []string{"tree/", "tree/a", "tree/dangling", "tree/empty/", "tree/link", "tree/sub/", "tree/sub/empty", "tree/sub/run", "tree/" + long}
	if fmt.Sprint(names) != fmt.Sprint(want) {
		t.Errorf("entries are %v", names)
	}
	// And back, into a folder that does not exist yet.
	if a := g.do("POST", "/archive"+at(g.dir+"/new/copy"), testToken, strings.NewReader(a.body), nil); a.code/100 != 2 {
		t.Fatalf("%d %s", a.code, a.body)
	}
	copied := g.dir + "/new/copy/tree"
	for name, mode := range map[string]os.FileMode{"a": 0o640, "sub": 0o755 | os.ModeDir, "sub/run": 0o755, "sub/empty": 0o600, "empty": 0o700 | os.ModeDir, "": 0o755 | os.ModeDir, "link": 0o777 | os.ModeSymlink} {
		uid, gid, got := owner(t, filepath.Join(copied, name))
		if got != mode || uid != g.nobody.UID || gid != g.nobody.GID {
			t.Errorf("%q is %d:%d %v, not %v", name, uid, gid, got, mode)
		}
	}
	for _, name := range []string{"a", "empty", "sub", ""} {
		if info, err := os.Stat(filepath.Join(copied, name)); err != nil || !info.ModTime().Equal(when) {
			t.Errorf("%q changed at %v, %v", name, info.ModTime(), err)
		}
	}
	for name, want := range map[string]string{"a": "aaa", "link": "#!/bin/sh\n", long: "long"} {
		if b, _ := os.ReadFile(filepath.Join(copied, name)); string(b) != want {
			t.Errorf("%q has %q", name, b)
		}
	}
	if to, _ := os.Readlink(copied + "/dangling"); to != "/nowhere/at/all" {
		t.Errorf("the link leads to %q", to)
	}
	// Again, over the existing files.
	if a := g.do("POST", "/archive"+at(g.dir+"/new/copy"), testToken, strings.NewReader(a.body), nil); a.code/100 != 2 {
		t.Errorf("%d %s", a.code, a.body)
	}
	// One file alone.
	a = g.do("GET", "/archive"+at(g.dir+"/tree/sub/run"), testToken, nil, nil)
	h, err := tar.NewReader(strings.NewReader(a.body)).Next()
	if err != nil || h.Name != "run" || h.Size != 10 {
		t.Errorf("a file's archive has %v, %v", h, err)
	}
	for path, want := range map[string]int{g.dir + "/none": 404, "/etc/shadow": 403, g.dir + "/tree/fifo": 400, "/root": 403, "": 400} {
		if a := g.do("GET", "/archive"+at(path), testToken, nil, nil); a.code != want {
			t.Errorf("archive of %q answers %d %s", path, a.code, a.body)
		}
	}
	// An unreadable file in the middle is an error. It breaks off a response that has begun.
	g.file("tree/sub/secret", "s", 0o600)
	if a := g.do("GET", "/archive"+at(g.dir+"/tree"), testToken, nil, nil); a.code != 403 || !strings.Contains(a.body, "sub/secret: permission denied") {
		t.Errorf("an archive with a file that the user may not read answers %d %s", a.code, a.body)
	}
	g.file("tree/sub/large", strings.Repeat("large", 1<<18), 0o644)
	req, _ := http.NewRequestWithContext(t.Context(), "GET", g.url+"/archive"+at(g.dir+"/tree"), nil)
	req.Header.Set(hostwire.AccessToken, testToken)
	res, err := g.plain.Do(req)
	if err == nil {
		_, err = io.Copy(io.Discard, res.Body)
		res.Body.Close()
	}
	if err == nil {
		t.Error("an archive without one of its files looks complete")
	}
}

func archive(entries ...tar.Header) *bytes.Buffer {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = 4
		}
		if err := w.WriteHeader(&h); err != nil {
			panic(err)
		}
		if h.Size > 0 {
			_, _ = w.Write([]byte("evil"))
		}
	}
	w.Close()
	return &b
}

// TestArchiveConfined checks that nothing in an archive reaches outside its folder.
func TestArchiveConfined(t *testing.T) {
	g := boot(t)
	reg, dir, sym, link := byte(tar.TypeReg), byte(tar.TypeDir), byte(tar.TypeSymlink), byte(tar.TypeLink)
	outside := g.file("outside", "good", 0o666)
	_ = os.Mkdir(g.dir+"/box", 0o777)
	_ = os.Chmod(g.dir+"/box", 0o777)
	for _, c := range []struct {
		what string
		tar  []tar.Header
		want int
	}{
		{"parent", []tar.Header{{Typeflag: reg, Name: "../outside"}}, 400},
		{"hidden parent", []tar.Header{{Typeflag: reg, Name: "a/../../outside"}}, 400},
		{"absolute", []tar.Header{{Typeflag: reg, Name: g.dir + "/outside"}}, 204},
		{"link and through it", []tar.Header{{Typeflag: sym, Name: "up", Linkname: ".."}, {Typeflag: reg, Name: "up/outside"}}, 400},
		{"absolute link", []tar.Header{{Typeflag: sym, Name: "up2", Linkname: g.dir}, {Typeflag: reg, Name: "up2/outside"}}, 400},
		{"link replaced", []tar.Header{{Typeflag: sym, Name: "f", Linkname: "../outside"}, {Typeflag: reg, Name: "f"}}, 204},
		{"folder through a link", []tar.Header{{Typeflag: sym, Name: "up3", Linkname: ".."}, {Typeflag: dir, Name: "up3/made"}}, 400},
		{"mode through a link", []tar.Header{{Typeflag: sym, Name: "up4", Linkname: "../outside"}, {Typeflag: dir, Name: "up4", Mode: 0o700}}, 400},
		{"hard link", []tar.Header{{Typeflag: link, Name: "h", Linkname: "../outside"}}, 400},
		{"hard link, absolute", []tar.Header{{Typeflag: link, Name: "h", Linkname: outside}}, 404},
		{"hard link to a link", []tar.Header{{Typeflag: sym, Name: "s5", Linkname: "../outside"}, {Typeflag: link, Name: "h5", Linkname: "s5"}, {Typeflag: reg, Name: "h5"}}, 204},
		{"device", []tar.Header{{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3}}, 400},
		{"fifo", []tar.Header{{Typeflag: tar.TypeFifo, Name: "p"}}, 400},
		{"folder over a file", []tar.Header{{Typeflag: reg, Name: "x6"}, {Typeflag: dir, Name: "x6"}, {Typeflag: reg, Name: "x6/y"}}, 204},
		{"file over a folder", []tar.Header{{Typeflag: dir, Name: "d7"}, {Typeflag: reg, Name: "d7"}}, 409},
		{"setuid", []tar.Header{{Typeflag: reg, Name: "su", Mode: 0o6755}}, 204},
		{"the folder itself", []tar.Header{{Typeflag: dir, Name: "./", Mode: 0o700}}, 204},
	} {
		for _, user := range []string{"nobody", "root"} {
			_ = os.RemoveAll(g.dir + "/box")
			_ = os.Mkdir(g.dir+"/box", 0o777)
			_ = os.Chmod(g.dir+"/box", 0o777)
			if a := g.do("POST", "/archive"+at(g.dir+"/box", "username", user), testToken, archive(c.tar...), nil); a.code != c.want {
				t.Errorf("%s as %s answers %d %s, not %d", c.what, user, a.code, a.body, c.want)
			}
			if b, _ := os.ReadFile(outside); string(b) != "good" {
				t.Fatalf("%s as %s changed a file outside", c.what, user)
			}
			if _, _, mode := owner(t, outside); mode != 0o666 {
				t.Fatalf("%s as %s changed a mode outside", c.what, user)
			}
			if _, err := os.Stat(g.dir + "/made"); err == nil {
				t.Fatalf("%s as %s created a folder outside", c.what, user)
			}
			if c.what == "setuid" {
				if _, _, mode := owner(t, g.dir+"/box/su"); mode != 0o755 {
					t.Errorf("the file's mode is %v", mode)
				}
			}
		}
	}
	good := archive(tar.Header{Typeflag: reg, Name: "f"}).String()
	for _, bad := range []string{"not a tar at all, but long enough to be a block" + strings.Repeat("x", 1000), good[:514], good[:300]} {
		if a := g.do("POST", "/archive"+at(g.dir+"/box"), testToken, strings.NewReader(bad), nil); a.code != 400 {
			t.Errorf("a broken archive answers %d %s", a.code, a.body)
		}
	}
	if a := g.do("POST", "/archive"+at(g.dir+"/outside"), testToken, strings.NewReader(good), nil); a.code != 400 {
		t.Errorf("an archive into a file answers %d %s", a.code, a.body)
	}
	if a := g.do("POST", "/archive"+at("/etc/wrenn"), testToken, strings.NewReader(good), nil); a.code != 403 {
		t.Errorf("an archive into root's folder answers %d %s", a.code, a.body)
	}
}

// TestDownloadAbandoned checks that a download ends when its client disconnects.
func TestDownloadAbandoned(t *testing.T) {
	g := boot(t)
	if err := os.Truncate(g.file("big", "", 0o644), 1<<30); err != nil {
		t.Fatal(err)
	}
	before := runtime.NumGoroutine()
	for _, path := range []string{"/files", "/archive"} {
		for _, client := range []*http.Client{g.plain, g.client} {
			ctx, cancel := context.WithCancel(t.Context())
			req, _ := http.NewRequestWithContext(ctx, "GET", g.url+path+at(g.dir+"/big"), nil)
			req.Header.Set(hostwire.AccessToken, testToken)
			res, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.CopyN(io.Discard, res.Body, 1<<20)
			cancel()
			if _, err := io.Copy(io.Discard, res.Body); !errors.Is(err, context.Canceled) {
				t.Errorf("the body ends with %v", err)
			}
			res.Body.Close()
		}
	}
	g.client.CloseIdleConnections()
	g.plain.CloseIdleConnections()
	await.Until(t, "the requests end", func() bool { return runtime.NumGoroutine() <= before+2 })
}
