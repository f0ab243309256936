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

// accept accepts connections in the background, until the listener is closed.
func accept(l *Listener) <-chan net.Conn {
	accepted := make(chan net.Conn, 64)
	go func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	return accepted
}

// answer responds to the client over server, closes that, and checks what the client
// gets.
func answer(t *testing.T, server, client net.Conn) {
	t.Helper()
	if _, err := server.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	server.Close()
	if b, err := io.ReadAll(client); err != nil || string(b) != "answer" {
		t.Errorf("the client got %q, %v", b, err)
	}
}

// TestPass checks that the other end can serve a passed connection, and first gets what
// was already read.
func TestPass(t *testing.T) {
	l, s := listen(t)
	accepted := accept(l)
	for _, copies := range []bool{false, true} {
		client, server := pair(t)
		if _, err := client.Write([]byte("rest")); err != nil {
			t.Fatal(err)
		}
		_ = client.CloseWrite()
		if err := s.Send(server, []byte("first, ")); err != nil {
			t.Fatal(err)
		}
		if err := server.Close(); err != nil { // The other end has its own descriptor.
			t.Fatal(err)
		}
		c := await.Recv(t, "the connection", accepted)
		var got bytes.Buffer
		var err error
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
		answer(t, c, client)
	}
}

// TestNobodyTakes checks that a sender keeps connections that it cannot pass, and passes
// the next ones to a program that has restarted.
func TestNobodyTakes(t *testing.T) {
	l, s := listen(t)
	_, server := pair(t)
	if err := s.Send(server, make([]byte, maxRead+1)); err == nil {
		t.Error("passed more bytes than the limit")
	}
	accepted := accept(l)
	for range 3 {
		if err := s.Send(server, []byte("x")); err != nil {
			t.Fatal(err)
		}
		await.Recv(t, "the connection", accepted).Close()
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := s.Send(server, []byte("x")); err == nil {
		t.Error("passed although nothing listens")
	}
	l, err := Listen(s.Path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted = accept(l)
	if err := s.Send(server, []byte("x")); err != nil {
		t.Fatal(err)
	}
	await.Recv(t, "the connection", accepted).Close()
}

// TestProgramStops checks that if a program stops with a connection in its queue, the
// sender keeps the connection.
func TestProgramStops(t *testing.T) {
	l, s := listen(t)
	client, server := pair(t)
	sent := make(chan error, 1)
	go func() { sent <- s.Send(server, []byte("x")) }()
	await.Until(t, "the program gets the connection", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.senders) == 1
	})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := await.Recv(t, "the end of Send", sent); err == nil {
		t.Fatal("passed to a program that has stopped")
	}
	answer(t, server, client)
}

// TestProgramHangs passes connections to a program that accepts none: no sender waits for
// another, and each keeps its connection, whatever the program does afterwards.
func TestProgramHangs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	hung, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close()
	if err := hung.SetDeadline(time.Now().Add(await.Hang)); err != nil {
		t.Fatal(err)
	}
	s := &Sender{Path: path}
	defer s.Close()
	_, server := pair(t)
	const together = 8
	sent := make(chan error, together)
	for range together {
		go func() { sent <- s.Send(server, []byte("x")) }()
	}
	offers := make([]offer, together)
	for i := range offers {
		if offers[i].sender, err = hung.AcceptUnix(); err != nil {
			t.Fatalf("sender %d waited for another one: %v", i, err)
		}
		defer offers[i].sender.Close()
	}
	for range together {
		if err := await.Recv(t, "the end of Send", sent); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("passed to a program that hangs: %v", err)
		}
	}
	for _, o := range offers {
		if o.accept() {
			t.Error("the program has a connection that its sender kept")
		}
	}
}

// TestAcceptedLate checks that the sender knows who has a connection which the program
// accepts after the sender's deadline, but before the sender withdraws it.
func TestAcceptedLate(t *testing.T) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ends[i] = c.(*net.UnixConn)
	}
	if o := (offer{sender: ends[1]}); !o.accept() {
		t.Fatal("not accepted")
	}
	if err := ends[0].SetDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if keep, err := taken(ends[0]); keep || err != nil {
		t.Errorf("the sender kept it: %v, %v", keep, err)
	}
}

// TestStrangers checks that senders that pass something else lose their own connection,
// and nobody else's.
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
	accepted := accept(l)
	if err := s.Send(server, []byte("x")); err != nil {
		t.Fatal(err)
	}
	await.Recv(t, "the connection", accepted).Close()
}
