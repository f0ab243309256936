package server_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestFiles(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	base := "/v1/sandboxes/" + p.create(map[string]any{})
	content := bytes.Repeat([]byte(strings.Repeat("0123456789", 100)+"\n"), 1600) // a line is a message
	put := p.call("PUT", base+"/files?path=/tmp/f", content).want(200).object()
	if put["size"] != float64(len(content)) || put["path"] != "/tmp/f" || put["name"] != "f" {
		t.Errorf("written: %v", put)
	}
	// The content type does not matter for files.
	p.call("PUT", base+"/files?path=/tmp/g", `{"not": "json`).want(200)
	p.call("PUT", base+"/files?path=/tmp/empty", []byte{}).want(200)
	p.call("PUT", base+"/files?path=/tmp/large", content).want(200)
	r := p.call("GET", base+"/files?path=/tmp/f", nil).want(200)
	if !bytes.Equal(r.Body, content) || r.Header.Get("Content-Length") != strconv.Itoa(len(content)) || r.Header.Get("Accept-Ranges") != "bytes" {
		t.Errorf("read %d bytes, header %v", len(r.Body), r.Header)
	}
	if r := p.call("GET", base+"/files?path=/tmp/empty", nil).want(200); len(r.Body) != 0 {
		t.Errorf("empty file has %q", r.Body)
	}
	size := len(content)
	for _, tt := range []struct {
		header   string
		status   int
		from, to int
	}{
		{"bytes=0-0", 206, 0, 1},
		{"bytes=0-", 206, 0, size},
		{"bytes=10-19", 206, 10, 20},
		{"bytes=100-", 206, 100, size},
		{"bytes=-5", 206, size - 5, size},
		{"bytes=-99999999", 206, 0, size},
		{"bytes=5-99999999", 206, 5, size},
		{"bytes=99999999-", 416, 0, 0},
		{"bytes=-0", 416, 0, 0},
		{"bytes=5-3", 200, 0, size},
		{"bytes=0-1,4-5", 200, 0, size},
		{"lines=0-1", 200, 0, size},
		{"bytes=a-b", 200, 0, size},
		{"bytes=+1-2", 200, 0, size},
	} {
		for _, path := range []string{"/tmp/f", "/tmp/large"} {
			r := p.call("GET", base+"/files?path="+path, nil, "Range", tt.header)
			if r.Status != tt.status {
				t.Errorf("%s, Range %s: %d, want %d", path, tt.header, r.Status, tt.status)
				continue
			}
			if tt.status == 416 {
				r.fails(416, "range_not_satisfiable")
				if got := r.Header.Get("Content-Range"); got != fmt.Sprintf("bytes */%d", size) {
					t.Errorf("%s, Range %s: Content-Range %q", path, tt.header, got)
				}
				continue
			}
			if !bytes.Equal(r.Body, content[tt.from:tt.to]) {
				t.Errorf("%s, Range %s: %d bytes, want %d", path, tt.header, len(r.Body), tt.to-tt.from)
			}
			if want := fmt.Sprintf("bytes %d-%d/%d", tt.from, tt.to-1, size); tt.status == 206 && r.Header.Get("Content-Range") != want {
				t.Errorf("%s, Range %s: Content-Range %q, want %q", path, tt.header, r.Header.Get("Content-Range"), want)
			}
		}
	}
	if got := p.call("HEAD", base+"/files?path=/tmp/large", nil).want(200).Header.Get("Content-Length"); got != strconv.Itoa(size) {
		t.Errorf("HEAD of a large file: Content-Length %q", got)
	}
	for _, version := range []string{`"x"`, "Wed, 21 Oct 2015 07:28:00 GMT"} {
		r := p.call("GET", base+"/files?path=/tmp/f", nil, "Range", "bytes=0-0", "If-Range", version).want(200)
		if !bytes.Equal(r.Body, content) {
			t.Errorf("a range of another version, %s: %d bytes", version, len(r.Body))
		}
	}
	p.agent.mu.Lock()
	p.agent.files["/proc/status"] = []byte("not empty\n")
	p.agent.files["/proc/kallsyms"] = []byte("without an end\n")
	p.agent.files[breakAfter] = []byte("one\ntwo\n")
	p.agent.mu.Unlock()
	if r := p.call("GET", base+"/files?path=/proc/status", nil).want(200); string(r.Body) != "not empty\n" {
		t.Errorf("file without a size: %q", r.Body)
	}
	for _, suffix := range []string{"bytes=-3", "bytes=-0"} {
		if r := p.call("GET", base+"/files?path=/proc/kallsyms", nil, "Range", suffix).want(200); string(r.Body) != "without an end\n" {
			t.Errorf("Range %s of a file whose size is not known: %q", suffix, r.Body)
		}
	}
	for _, path := range []string{"/files", "/archive"} {
		if r, err := p.try("GET", base+path+"?path="+breakAfter, nil); err == nil {
			t.Errorf("a download of %s that broke off looks complete: %d %q", path, r.Status, r.Body)
		}
	}
	p.call("PUT", base+"/archive?path=/dir", []byte("tar\nbytes\n")).want(200)
	if r := p.call("GET", base+"/archive?path=/dir", nil).want(200); string(r.Body) != "tar\nbytes\n" || r.Header.Get("Content-Type") != "application/x-tar" {
		t.Errorf("archive: %q as %s", r.Body, r.Header.Get("Content-Type"))
	}
	// An upload that breaks off writes nothing.
	conn, err := net.Dial("tcp", p.http.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "PUT %s/files?path=/tmp/half HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Length: 1000\r\n\r\nhalf", base, adminKey)
	conn.(*net.TCPConn).CloseWrite()
	io.Copy(io.Discard, conn)
	conn.Close()
	p.call("GET", base+"/files?path=/tmp/half", nil).fails(404, "not_found")
}

// heapDuring returns the largest growth of the heap while f ran.
func heapDuring(f func()) uint64 {
	runtime.GC()
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	stop, done := make(chan struct{}), make(chan struct{})
	var most uint64
	go func() {
		defer close(done)
		tick := time.NewTicker(20 * time.Millisecond) // real time: the interval of the measurements
		defer tick.Stop()
		for {
			var now runtime.MemStats
			runtime.ReadMemStats(&now)
			most = max(most, now.HeapInuse)
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	f()
	close(stop)
	<-done
	return most - min(most, before.HeapInuse)
}

// TestLongBodies sends a GiB through each route that takes bodies of any size. It
// measures the whole process, so it is not parallel.
func TestLongBodies(t *testing.T) {
	if testing.Short() {
		t.Skip("moves hundreds of megabytes")
	}
	const size, bound = 256 << 20, 64 << 20
	p := newPlane(t)
	p.agent.guest = guestHandler()
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	host := "8000-" + made.str("id") + ".localhost"
	send := func(method, url, host string) (status int, n int64, text string) {
		var body io.Reader
		if method != "GET" {
			body = io.LimitReader(zeros{}, size)
		}
		req, err := http.NewRequest(method, url, body)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		if body != nil {
			req.ContentLength = size
		}
		req.Header.Set("X-API-Key", adminKey)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		var head bytes.Buffer
		n, err = io.Copy(&head, io.LimitReader(res.Body, 1000))
		if err != nil {
			t.Fatal(err)
		}
		rest, err := io.Copy(io.Discard, res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, n + rest, head.String()
	}
	for _, tt := range []struct {
		name, method, url, host string
		n                       int64
		text                    string
	}{
		{"download through the proxy", "GET", p.http.URL + "/zeros?n=" + strconv.Itoa(size), host, size, ""},
		{"upload through the proxy", "POST", p.http.URL + "/count", host, 9, strconv.Itoa(size)},
		{"upload of a file", "PUT", p.http.URL + "/v1/sandboxes/" + made.str("id") + "/files?path=/dev/null", "", -1, strconv.Itoa(size)},
	} {
		grew := heapDuring(func() {
			status, n, text := send(tt.method, tt.url, tt.host)
			if status != 200 || tt.n >= 0 && n != tt.n || !strings.Contains(text, tt.text) {
				t.Errorf("%s: %d, %d bytes, %.100q", tt.name, status, n, text)
			}
		})
		t.Logf("%s: heap grew by %d KiB", tt.name, grew>>10)
		if grew > bound {
			t.Errorf("%s: heap grew by %d MiB", tt.name, grew>>20)
		}
	}
}
