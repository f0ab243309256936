// Package handover passes a client's connection from the front door to another
// program on this machine, which then serves it itself.
//
// The descriptor travels over a Unix socket (SCM_RIGHTS), together with what was
// already read of the connection. The program answers with one byte when it accepts
// the connection. Until then it is the front door's.
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
	// maxRead is how many bytes may have been read of a connection that is passed: as
	// many as the longest header that upstream.Server takes.
	maxRead = 4 << 10
	// maxRights is how many descriptors the kernel lets a message have.
	maxRights = 253
	// sendWithin bounds the wait until the program accepts a connection.
	sendWithin = time.Second
	// maxIdle is how many of its own connections a sender keeps.
	maxIdle = 32
)

// Path returns the path at which the program that listens on the given Unix socket
// takes connections from a [Sender].
func Path(socket string) string { return socket + ".passed" }

// Sender passes connections to the program that listens at Path. Its methods can be
// called concurrently: connections do not wait for one another.
type Sender struct {
	Path string

	mu     sync.Mutex // held for no call that can block
	idle   []*net.UnixConn
	closed bool
}

// Send passes a connection with the bytes read from it, and waits until the program
// has accepted it. Then the caller closes its own descriptor. If Send fails, only the
// caller has the connection.
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
		// A connection that was kept may lead to a program that has ended.
		if fresh || errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("pass connection: %w", err)
		}
	}
}

// pass passes one connection, and says whether the caller may pass another over to.
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

// taken waits until the program has accepted what was passed last. It returns as pass
// does.
func taken(to *net.UnixConn) (keep bool, err error) {
	var b [1]byte
	if _, err = to.Read(b[:]); !errors.Is(err, os.ErrDeadlineExceeded) {
		return err == nil, err
	}
	// After this the program cannot accept it any more. It may have before.
	if e := errors.Join(to.CloseRead(), to.SetDeadline(time.Time{})); e != nil {
		return false, e
	}
	if _, e := to.Read(b[:]); e == nil {
		return false, nil
	}
	return false, err
}

// kept returns an unused connection to the program, or nil if there is none.
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

// offer is a passed connection that its sender keeps until this program accepts it.
type offer struct {
	*conn
	sender *net.UnixConn
}

// accept accepts the connection, and says whether the sender gave it up.
func (o offer) accept() bool {
	_ = o.sender.SetWriteDeadline(time.Now().Add(sendWithin))
	_, err := o.sender.Write([]byte{1})
	return err == nil
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
			time.Sleep(50 * time.Millisecond) // Probably too many files are open.
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
			return // The sender is not a [Sender].
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

// connection returns the connection whose descriptor came with a message. If it also
// returns an error, the caller must still close the connection.
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
			_ = o.conn.Close() // This program's descriptor: the sender goes on with its own.
		case <-l.closed:
			return nil, net.ErrClosed
		}
	}
}

// Close implements [net.Listener]. Connections that were accepted go on; the others
// are left to their senders.
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

// conn is a connection that was passed. Reads begin with what its sender had read.
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
