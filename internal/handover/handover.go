// Package handover passes a client's connection from the front door to another program
// on this machine, which then serves it.
//
// The front door sends the descriptor over a Unix socket (SCM_RIGHTS), with the bytes
// that it has already read. The program answers with one byte when it accepts the
// connection. Until then, the front door owns it.
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
	// maxRead is how many bytes may have been read from a connection that is passed. It is
	// the longest header that upstream.Server accepts.
	maxRead = 4 << 10
	// maxRights is the kernel's limit for the descriptors of one message.
	maxRights = 253
	// sendWithin bounds the wait until the program accepts a connection.
	sendWithin = time.Second
	// maxIdle is how many idle connections to the program a sender keeps.
	maxIdle = 32
)

// Path returns the path of the socket for passed connections of the program that listens
// on the given Unix socket.
func Path(socket string) string { return socket + ".passed" }

// Sender passes connections to the program that listens at Path. It is safe for
// concurrent use; connections do not wait for one another.
type Sender struct {
	Path string

	mu     sync.Mutex // held for no call that can block
	idle   []*net.UnixConn
	closed bool
}

// Send passes a connection with the bytes read from it, and waits until the program has
// accepted it. The caller must then close its own descriptor. If Send fails, the caller
// still owns the connection.
func (s *Sender) Send(c syscall.Conn, read []byte) error {
	if len(read) == 0 || len(read) > maxRead {
		return fmt.Errorf("pass connection: %d bytes were read, not 1 to %d", len(read), maxRead)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	until := time.Now().Add(sendWithin)
	for {
		to := s.kept()
		fresh := to == nil
		if fresh {
			if to, err = net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: s.Path, Net: "unixpacket"}); err != nil {
				return err
			}
		}
		keep, err := pass(to, raw, read, until)
		if keep {
			s.keep(to)
			return nil
		}
		_ = to.Close()
		if err == nil {
			return nil
		}
		// An idle connection may lead to a program that has ended.
		if fresh || errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("pass connection: %w", err)
		}
	}
}

// pass passes one connection over to. keep reports whether to can be used again.
func pass(to *net.UnixConn, raw syscall.RawConn, read []byte, until time.Time) (keep bool, err error) {
	if err := to.SetDeadline(until); err != nil {
		return false, err
	}
	if e := raw.Control(func(fd uintptr) {
		_, _, err = to.WriteMsgUnix(read, syscall.UnixRights(int(fd)), nil)
	}); e != nil {
		return false, e
	}
	if err != nil {
		return false, err
	}
	return taken(to)
}

// taken waits until the program has accepted the last connection. Its results are those
// of pass.
func taken(to *net.UnixConn) (keep bool, err error) {
	var b [1]byte
	if _, err = to.Read(b[:]); !errors.Is(err, os.ErrDeadlineExceeded) {
		return err == nil, err
	}
	// After this the program cannot accept the connection any more, but may have before.
	if e := errors.Join(to.CloseRead(), to.SetDeadline(time.Time{})); e != nil {
		return false, e
	}
	if _, e := to.Read(b[:]); e == nil {
		return false, nil
	}
	return false, err
}

// kept returns an idle connection to the program, or nil if there is none.
func (s *Sender) kept() *net.UnixConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.idle) == 0 {
		return nil
	}
	last := len(s.idle) - 1
	to := s.idle[last]
	s.idle = s.idle[:last]
	return to
}

// keep keeps a connection to the program for later use, or closes it.
func (s *Sender) keep(to *net.UnixConn) {
	s.mu.Lock()
	keep := !s.closed && len(s.idle) < maxIdle
	if keep {
		s.idle = append(s.idle, to)
	}
	s.mu.Unlock()
	if !keep {
		_ = to.Close()
	}
}

// Close closes the sender's own connections.
func (s *Sender) Close() error {
	s.mu.Lock()
	idle := s.idle
	s.idle, s.closed = nil, true
	s.mu.Unlock()
	var errs []error
	for _, to := range idle {
		errs = append(errs, to.Close())
	}
	return errors.Join(errs...)
}

// Listener is a [net.Listener] whose connections come from a [Sender].
type Listener struct {
	socket *net.UnixListener
	passed chan offer
	closed chan struct{}
	close  sync.Once

	mu      sync.Mutex
	senders map[*net.UnixConn]struct{} // nil: closed
}

// offer is a passed connection that its sender still owns until this program accepts it.
type offer struct {
	*conn
	sender *net.UnixConn
}

// accept tells the sender that this program accepts the connection. It returns false if
// the sender has taken it back.
func (o offer) accept() bool {
	_ = o.sender.SetWriteDeadline(time.Now().Add(sendWithin))
	_, err := o.sender.Write([]byte{1})
	return err == nil
}

// Listen listens for passed connections at path and replaces the socket of an earlier
// process. Whoever may write to the socket, which gets the given mode, may pass them.
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
	l := &Listener{socket: socket, passed: make(chan offer), closed: make(chan struct{}), senders: make(map[*net.UnixConn]struct{})}
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
			time.Sleep(50 * time.Millisecond) // probably too many open files
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

// take receives a sender's connections until it disconnects.
func (l *Listener) take(sender *net.UnixConn) {
	defer func() {
		l.mu.Lock()
		delete(l.senders, sender)
		l.mu.Unlock()
		_ = sender.Close()
	}()
	b, rights := make([]byte, maxRead), make([]byte, syscall.CmsgSpace(4*maxRights))
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
			return // the message is not from a [Sender]
		}
		select {
		case l.passed <- offer{&conn{TCPConn: c, read: append([]byte(nil), b[:n]...)}, sender}:
		case <-l.closed:
			_ = c.Close()
			return
		}
	}
}

var errRights = errors.New("a message without one descriptor of a TCP connection")

// connection returns the connection whose descriptor came with a message. The caller
// closes it, even if there is an error.
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
	for {
		select {
		case o := <-l.passed:
			if o.accept() {
				return o.conn, nil
			}
			_ = o.conn.Close() // only this program's descriptor; the sender keeps its own
		case <-l.closed:
			return nil, net.ErrClosed
		}
	}
}

// Close implements [net.Listener]. Accepted connections stay open; senders keep the
// others.
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

// conn is a passed connection. Reads first return what its sender had read.
type conn struct {
	*net.TCPConn
	read []byte // what the sender had read and this program has not
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

// WriteTo implements [io.WriterTo], because TCPConn's would skip what the sender had read.
func (c *conn) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(c.read)
	c.read = c.read[n:]
	if err != nil {
		return int64(n), err
	}
	m, err := c.TCPConn.WriteTo(w)
	return int64(n) + m, err
}
