package qmp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// peer plays QEMU on the other end of a pipe: it answers every line by what
// answer returns for it.
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
			t.Errorf("%s: taken for QEMU", name)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	ours, theirs := net.Pipe()
	defer theirs.Close()
	if _, err := NewConn(ctx, ours); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a silent peer: %v", err)
	}
	// Answers twice, to nobody, and then garbage.
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
