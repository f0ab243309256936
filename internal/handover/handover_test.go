package handover

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// pair returns both ends of a TCP connection.
func pair(t *testing.T) (client, server *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	for _, conn := range []net.Conn{c, s} {
		if err := conn.SetDeadline(time.Now().Add(await.Hang)); err != nil {
			t.Fatal(err)
		}
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

func listen(t *testing.T) (*Listener, *Sender) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	s := &Sender{Path: path}
	t.Cleanup(func() { l.Close(); s.Close() })
	return l, s
}

// TestPass has another end serve a connection, with what was read of it first.
func TestPass(t *testing.T) {
	l, s := listen(t)
	for _, copies := range []bool{false, true} {
		client, server := pair(t)
		if _, err := client.Write([]byte("rest")); err != nil {
			t.Fatal(err)
		}
		_ = client.CloseWrite()
		if err := s.Send(server, []byte("first, ")); err != nil {
			t.Fatal(err)
		}
		if err := server.Close(); err != nil { // The other end has its own.
			t.Fatal(err)
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		if copies {
			_, err = io.Copy(&got, c)
		} else {
			_, err = got.ReadFrom(struct{ io.Reader }{c})
		}
		if err != nil || got.String() != "first, rest" {
			t.Errorf("got %q, %v", &got, err)
		}
		if c.RemoteAddr().String() != client.LocalAddr().String() {
			t.Errorf("the client's address is %v", c.RemoteAddr())
		}
		if _, err := c.Write([]byte("answer")); err != nil {
			t.Fatal(err)
		}
		c.Close()
		if b, err := io.ReadAll(client); err != nil || string(b) != "answer" {
			t.Errorf("the client got %q, %v", b, err)
		}
	}
}

// TestNobodyTakes has the sender keep what cannot be passed, and pass again to a
// program that was started anew.
func TestNobodyTakes(t *testing.T) {
	l, s := listen(t)
	_, server := pair(t)
	if err := s.Send(server, make([]byte, MaxRead+1)); err == nil {
		t.Error("passed more than can be taken")
	}
	if err := s.Send(server, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := s.Send(server, []byte("x")); err == nil {
		t.Error("passed to nobody")
	}
	l, err := Listen(s.Path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := s.Send(server, []byte("x")); err != nil {
		t.Error(err)
	}
	if c, err := l.Accept(); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
}

// TestStrangers has senders that pass something else lose their connection, and
// no others.
func TestStrangers(t *testing.T) {
	l, s := listen(t)
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	_, server := pair(t)
	raw, err := server.File()
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	tcp := int(raw.Fd())
	for name, rights := range map[string][]byte{
		"nothing": nil, "a file": syscall.UnixRights(int(file.Fd())), "two connections": syscall.UnixRights(tcp, tcp), "a file too": syscall.UnixRights(tcp, int(file.Fd())),
	} {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: s.Path, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := c.WriteMsgUnix([]byte("x"), rights, nil); err != nil {
			t.Fatal(name, err)
		}
		_ = c.SetReadDeadline(time.Now().Add(await.Hang))
		if n, err := c.Read(make([]byte, 1)); n != 0 || os.IsTimeout(err) {
			t.Errorf("%s: %d, %v", name, n, err)
		}
		c.Close()
	}
	if err := s.Send(server, []byte("x")); err != nil {
		t.Error(err)
	}
	if c, err := l.Accept(); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
}
