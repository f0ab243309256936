package qmp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// peer plays QEMU on the other end of a pipe. It sends the greeting, and then the result of
// answer for every line.
func peer(t *testing.T, greeting string, answer func(line string) string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.Close()
		if _, err := io.WriteString(theirs, greeting+"\n"); err != nil {
			return
		}
		for s := bufio.NewScanner(theirs); s.Scan(); {
			if _, err := io.WriteString(theirs, answer(s.Text())); err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { ours.Close(); <-done })
	return ours
}

func ok(line string) string {
	_, id, _ := strings.Cut(line, `"id":`)
	return fmt.Sprintf("{\"return\": {\"status\": \"running\"}, \"id\": %s\n", id)
}

func TestExecute(t *testing.T) {
	c, err := NewConn(t.Context(), peer(t, `{"QMP": {}}`, func(line string) string {
		if strings.Contains(line, "fail") {
			return strings.Replace(ok(line), `"return": {"status": "running"}`, `"error": {"class": "GenericError", "desc": "no"}`, 1)
		}
		return `{"event": "RESUME", "data": {}}` + "\n" + ok(line)
	}))
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ Status string }
	if err := c.Execute(t.Context(), "query-status", nil, &got); err != nil || got.Status != "running" {
		t.Errorf("got %v, %v", got, err)
	}
	var qe *Error
	if err := c.Execute(t.Context(), "fail", nil, nil); !errors.As(err, &qe) || qe.Desc != "no" {
		t.Errorf("got %v", err)
	}
	if e := <-c.Events(); e.Name != "RESUME" {
		t.Errorf("got event %v", e)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Execute(t.Context(), "query-status", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestHostilePeer(t *testing.T) {
	for name, greeting := range map[string]string{"not JSON": "hello", "no greeting": `{"event": "X"}`, "huge": strings.Repeat("x", maxMessage+1)} {
		if _, err := NewConn(t.Context(), peer(t, greeting, ok)); err == nil {
			t.Errorf("%s: accepted as QEMU", name)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	ours, theirs := net.Pipe()
	defer theirs.Close()
	if _, err := NewConn(ctx, ours); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a silent peer: %v", err)
	}
	// It responds twice without a request, and then sends garbage.
	c, err := NewConn(t.Context(), peer(t, `{"QMP": {}}`, func(line string) string {
		if strings.Contains(line, "capabilities") {
			return ok(line)
		}
		return `{"return": {}, "id": 99}` + "\n" + ok(line) + ok(line) + "garbage\n"
	}))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Execute(t.Context(), "x", nil, nil)
	if err := c.Execute(t.Context(), "y", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after garbage: %v", err)
	}
}

// TestAnswerBeforeEnd checks that a response counts although QEMU closes the connection
// right after it.
func TestAnswerBeforeEnd(t *testing.T) {
	for range 100 {
		c, err := NewConn(t.Context(), peer(t, `{"QMP": {}}`, func(line string) string {
			if strings.Contains(line, "capabilities") {
				return ok(line)
			}
			return ok(line) + "garbage\n"
		}))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Execute(t.Context(), "query-status", nil, nil); err != nil {
			t.Fatal(err)
		}
		if err := c.Execute(t.Context(), "query-status", nil, nil); !errors.Is(err, ErrClosed) {
			t.Fatalf("after garbage: %v", err)
		}
	}
}

// TestPeerThatDoesNotRead checks that a QEMU that stops reading does not block the agent.
func TestPeerThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		go func() {
			_, _ = io.WriteString(theirs, "{\"QMP\": {}}\n")
			line, _ := bufio.NewReaderSize(theirs, 1<<10).ReadString('\n')
			_, _ = io.WriteString(theirs, ok(strings.TrimSpace(line)))
		}()
		c, err := NewConn(t.Context(), ours)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := c.Execute(t.Context(), "query-status", nil, nil); !errors.Is(err, ErrClosed) {
				t.Errorf("got %v", err)
			}
		}
		if _, open := <-c.Events(); open {
			t.Error("the connection is not closed")
		}
	})
}

func TestPass(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ends[i] = c.(*net.UnixConn)
	}
	go func() { // plays QEMU: responds, and writes to the descriptors that it gets
		theirs := ends[1]
		_, _ = io.WriteString(theirs, "{\"QMP\": {}}\n")
		line, oob := make([]byte, 4096), make([]byte, 128)
		for {
			n, oobn, _, _, err := theirs.ReadMsgUnix(line, oob)
			if err != nil || n == 0 {
				return
			}
			answer := `{"status": "running"}`
			if messages, _ := unix.ParseSocketControlMessage(oob[:oobn]); len(messages) > 0 {
				fds, _ := unix.ParseUnixRights(&messages[0])
				f := os.NewFile(uintptr(fds[0]), "passed")
				_, _ = f.Write(line[:n])
				f.Close()
				answer = `{"fdset-id": 7, "fd": 33}`
			}
			_, _ = io.WriteString(theirs, strings.Replace(ok(string(line[:n-1])), `{"status": "running"}`, answer, 1))
		}
	}()
	c, err := NewConn(t.Context(), ends[0])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, set := range []int{-1, 7} {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		got, err := c.Pass(t.Context(), f, set, "a test's")
		if err != nil || got != (Descriptor{Set: 7, FD: 33}) {
			t.Errorf("got %v, %v", got, err)
		}
		command, err := os.ReadFile(f.Name())
		if err != nil || !bytes.Contains(command, []byte(`"opaque":"a test's"`)) || bytes.Contains(command, []byte("fdset-id")) != (set >= 0) {
			t.Errorf("the descriptor came with %s, %v", command, err)
		}
	}
	// One more command, without a descriptor.
	if err := c.Execute(t.Context(), "query-status", nil, nil); err != nil {
		t.Error(err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"return": {}, "id": 1}` + "\n"))
	f.Add([]byte(`{"event": "STOP", "data": {}}` + "\n"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		for {
			if _, err := read(r); err != nil {
				return
			}
		}
	})
}
