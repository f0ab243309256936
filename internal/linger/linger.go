// Package linger closes a server's connections without losing a response.
//
// The kernel resets a connection that is closed while the client's bytes are unread or
// still arriving. A client that sends a large request may then fail to write before it
// has read an early response, such as 401 or 413. Here, as with nginx's lingering_close,
// closing a connection first closes the server's direction. Then it reads and drops what
// the client still sends, within bounds.
package linger

import (
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A closed connection lingers until the client has sent so many bytes, for so long in
// all, or for so long without a byte.
const (
	maxBytes = 256 << 20
	maxTime  = 30 * time.Second
	maxIdle  = 5 * time.Second
)

type bounds struct {
	bytes       int64
	whole, idle time.Duration
}

// Listener returns l with connections that linger after they are closed, if l itself
// accepts TCP or Unix sockets. Other connections do not linger.
func Listener(l net.Listener) net.Listener {
	return &listener{l, bounds{maxBytes, maxTime, maxIdle}}
}

type listener struct {
	net.Listener
	bounds bounds
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	s, ok := c.(socket)
	if !ok {
		return c, nil
	}
	return &Conn{socket: s, bounds: l.bounds}, nil
}

// socket is what TCP and Unix connections have in common.
type socket interface {
	net.Conn
	syscall.Conn
	CloseRead() error
	CloseWrite() error
}

// Conn is a TCP or Unix connection of a listener that [Listener] returned.
type Conn struct {
	socket
	bounds bounds

	mu     sync.Mutex
	closed bool
	gone   func() // set by OnGone, or nil
}

// OnGone makes f run when the connection is closed and no longer lingers. Call OnGone at
// most once, before the connection is closed.
func (c *Conn) OnGone(f func()) { c.gone = f }

// Close implements [net.Conn]. It ends reads and writes that are under way, and does not
// wait for the client.
func (c *Conn) Close() error { return c.close(true) }

// Abort closes the connection at once, and drops what was not sent yet.
func (c *Conn) Abort() error {
	if tcp, ok := c.socket.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	return c.close(false)
}

// Release closes this process's descriptor of a connection that another process serves
// now. The connection itself stays open.
func (c *Conn) Release() error { return c.close(false) }

func (c *Conn) close(lingers bool) error {
	c.mu.Lock()
	first := !c.closed
	c.closed = true
	c.mu.Unlock()
	if !first {
		return c.socket.Close() // returns the error for a closed connection
	}
	var rest *os.File
	if lingers {
		rest = c.rest()
	}
	err := c.socket.Close()
	if rest == nil {
		c.leave()
		return err
	}
	go func() {
		defer c.leave()
		c.bounds.discard(rest)
	}()
	return err
}

// leave calls the function that OnGone set.
func (c *Conn) leave() {
	if c.gone != nil {
		c.gone()
	}
}

// rest closes the server's direction and returns a second descriptor of the socket, or
// nil if the client cannot send any more either. The first descriptor can then be closed
// as usual, which ends reads and writes under way.
func (c *Conn) rest() *os.File {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	fd := -1
	// Unlike Read and Write, Control does not wait for other readers and writers.
	if err := raw.Control(func(open uintptr) {
		var b [1]byte
		n, _, err := unix.Recvfrom(int(open), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if n == 0 && err == nil || err != nil && err != unix.EAGAIN && err != unix.EINTR {
			return // the client has closed its direction, or is gone
		}
		if fd, err = unix.FcntlInt(open, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			_ = unix.Shutdown(fd, unix.SHUT_WR)
		}
	}); err != nil || fd < 0 {
		return nil
	}
	return os.NewFile(uintptr(fd), "lingering connection")
}

// discard reads f until the client is done or a bound is reached, and closes it.
func (b bounds) discard(f *os.File) {
	defer f.Close()
	buf := make([]byte, 8<<10)
	until := time.Now().Add(b.whole)
	for left := b.bytes; left > 0; {
		deadline := time.Now().Add(b.idle)
		if deadline.After(until) {
			deadline = until
		}
		if f.SetReadDeadline(deadline) != nil {
			return
		}
		n, err := f.Read(buf)
		if err != nil {
			return
		}
		left -= int64(n)
	}
}
