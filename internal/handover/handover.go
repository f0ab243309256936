// Package handover passes a client's connection from the front door to another
// program on this machine, which then serves it itself.
//
// The descriptor travels over a Unix socket (SCM_RIGHTS), together with what was
// already read of the connection.
package handover

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// MaxRead bounds what was read of a connection before it is passed.
	MaxRead = 4 << 10
	// maxRights is how many descriptors the kernel lets a message have.
	maxRights = 253
	// sendWithin bounds the wait for a program that takes no connections.
	sendWithin = time.Second
)

// Path is where a program that listens on a Unix socket takes connections.
func Path(socket string) string { return socket + ".passed" }

// Sender passes connections to the program that listens at Path.
type Sender struct {
	Path string

	mu   sync.Mutex // held while one connection is passed
	conn *net.UnixConn
}

// Send passes a connection, of which read was read. If it fails, nobody has it
// but the caller; else the caller closes its own descriptor.
func (s *Sender) Send(c syscall.Conn, read []byte) error {
	if len(read) == 0 || len(read) > MaxRead {
		return fmt.Errorf("pass connection: %d bytes were read, not 1 to %d", len(read), MaxRead)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for fresh := false; ; fresh = true {
		if s.conn == nil {
			fresh = true
			if s.conn, err = net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: s.Path, Net: "unixpacket"}); err != nil {
				return err
			}
		}
		_ = s.conn.SetWriteDeadline(time.Now().Add(sendWithin))
		if e := raw.Control(func(fd uintptr) {
			_, _, err = s.conn.WriteMsgUnix(read, syscall.UnixRights(int(fd)), nil)
		}); e != nil {
			return e
		}
		if err == nil {
			return nil
		}
		_ = s.conn.Close()
		s.conn = nil
		if fresh {
			return fmt.Errorf("pass connection: %w", err)
		}
	}
}

// Close closes the sender's own connection.
func (s *Sender) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return nil
	}
	return s.conn.Close()
}

// Listener is a [net.Listener] whose connections a [Sender] accepted.
type Listener struct {
	socket *net.UnixListener
	passed chan net.Conn
	closed chan struct{}
	close  sync.Once

	mu      sync.Mutex
	senders map[*net.UnixConn]struct{} // nil: closed
}

// Listen takes connections at path, in place of an earlier process. The socket
// gets the given mode: whoever may write to it may pass connections.
func Listen(path string, mode fs.FileMode) (*Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	socket, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, mode); err != nil {
		return nil, errors.Join(err, socket.Close())
	}
	l := &Listener{socket: socket, passed: make(chan net.Conn), closed: make(chan struct{}), senders: make(map[*net.UnixConn]struct{})}
	go l.accept()
	return l, nil
}

func (l *Listener) accept() {
	for {
		sender, err := l.socket.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(50 * time.Millisecond) // There are too many open files.
			continue
		}
		if !l.enter(sender) {
			_ = sender.Close()
			return
		}
		go l.take(sender)
	}
}

func (l *Listener) enter(sender *net.UnixConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.senders == nil {
		return false
	}
	l.senders[sender] = struct{}{}
	return true
}

// take takes a sender's connections until it leaves.
func (l *Listener) take(sender *net.UnixConn) {
	defer func() {
		l.mu.Lock()
		delete(l.senders, sender)
		l.mu.Unlock()
		_ = sender.Close()
	}()
	b, rights := make([]byte, MaxRead), make([]byte, syscall.CmsgSpace(4*maxRights))
	for {
		n, m, flags, _, err := sender.ReadMsgUnix(b, rights)
		if err != nil || n == 0 {
			return
		}
		c, err := connection(rights[:m])
		if err != nil || flags&(syscall.MSG_TRUNC|syscall.MSG_CTRUNC) != 0 {
			if c != nil {
				_ = c.Close()
			}
			return // It does not speak this package's language.
		}
		select {
		case l.passed <- &conn{TCPConn: c, read: append([]byte(nil), b[:n]...)}:
		case <-l.closed:
			_ = c.Close()
			return
		}
	}
}

var errRights = errors.New("a message without one descriptor of a TCP connection")

// connection returns the connection whose descriptor came with a message.
func connection(rights []byte) (*net.TCPConn, error) {
	messages, err := syscall.ParseSocketControlMessage(rights)
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, m := range messages {
		if some, err := syscall.ParseUnixRights(&m); err == nil {
			fds = append(fds, some...)
		}
	}
	var found *net.TCPConn
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "passed connection")
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			continue
		}
		tcp, ok := c.(*net.TCPConn)
		if !ok || found != nil {
			_ = c.Close()
			continue
		}
		found = tcp
	}
	if found == nil || len(fds) != 1 {
		return found, errRights
	}
	return found, nil
}

// Accept implements [net.Listener].
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.passed:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener]. Connections that were taken go on.
func (l *Listener) Close() error {
	err := net.ErrClosed
	l.close.Do(func() {
		close(l.closed)
		err = l.socket.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		for sender := range l.senders {
			_ = sender.Close()
		}
		l.senders = nil
	})
	return err
}

// Addr implements [net.Listener].
func (l *Listener) Addr() net.Addr { return l.socket.Addr() }

// conn is a connection that was passed.
type conn struct {
	*net.TCPConn
	read []byte // before it was passed, and not yet again
}

// Read implements [net.Conn].
func (c *conn) Read(p []byte) (int, error) {
	if len(c.read) == 0 {
		return c.TCPConn.Read(p)
	}
	n := copy(p, c.read)
	c.read = c.read[n:]
	return n, nil
}

// WriteTo implements [io.WriterTo]: TCPConn's own would leave out what was read.
func (c *conn) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(c.read)
	c.read = c.read[n:]
	if err != nil {
		return int64(n), err
	}
	m, err := c.TCPConn.WriteTo(w)
	return int64(n) + m, err
}
