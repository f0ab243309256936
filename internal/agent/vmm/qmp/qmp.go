// Package qmp is a client for the QEMU Machine Protocol (QEMU's docs/interop/qmp-spec.rst):
// commands and responses as JSON over a stream.
//
// The peer is not trusted, because its guest may have taken it over. So the package bounds
// and checks what it receives.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxMessage bounds a message from QEMU, in bytes. The largest expected one, the console's
// text, is far smaller.
const maxMessage = 4 << 20

// writeTimeout bounds the time that QEMU may take to read a command, so that a QEMU that
// does not read cannot block the agent.
const writeTimeout = 10 * time.Second

// ErrClosed means that the connection has ended.
var ErrClosed = errors.New("the connection to QEMU has ended")

// Error is QEMU's error response to a command.
type Error struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return "QEMU: " + e.Desc }

// Event is an event that QEMU reports.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// message is any message of QEMU.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Event    string          `json:"event"`
	Data     json.RawMessage `json:"data"`
	Return   json.RawMessage `json:"return"`
	Error    *Error          `json:"error"`
	ID       *uint64         `json:"id"`
}

// Conn is a connection to a QEMU. It is safe for concurrent use.
type Conn struct {
	conn   net.Conn
	events chan Event
	done   chan struct{}

	writing sync.Mutex
	passing sync.Mutex // one command with a descriptor at a time, because QEMU keeps only one

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan message
	err     error
}

// Dial connects to the Unix socket at path, which may be longer than a socket's address, and
// makes QEMU ready for commands.
func Dial(ctx context.Context, path string) (*Conn, error) {
	// A socket's address has at most 107 bytes, so name the folder by its descriptor.
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("connect to QEMU: %w", err)
	}
	defer unix.Close(dir)
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path)))
	if err != nil {
		return nil, fmt.Errorf("connect to QEMU: %w", err)
	}
	conn, err := NewConn(ctx, c)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to QEMU: %w", err), c.Close())
	}
	return conn, nil
}

// NewConn waits for QEMU's greeting on c and makes QEMU ready for commands. Unless it fails,
// the connection takes over c.
func NewConn(ctx context.Context, c net.Conn) (*Conn, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(deadlinePast) })
	r := bufio.NewReaderSize(c, 64<<10)
	m, err := read(r)
	if !stop() {
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("wait for greeting: %w", err)
	}
	if m.Greeting == nil {
		return nil, errors.New("the first message is not a greeting")
	}
	q := &Conn{conn: c, events: make(chan Event, 64), done: make(chan struct{}), waiting: map[uint64]chan message{}}
	go q.readAll(r)
	if err := q.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		_ = q.Close()
		return nil, err
	}
	return q, nil
}

// Events returns the channel of QEMU's events, which is closed with the connection. If
// nobody receives them, it drops events beyond a few.
func (q *Conn) Events() <-chan Event { return q.events }

// Close closes the connection. QEMU keeps running.
func (q *Conn) Close() error {
	err := q.conn.Close()
	<-q.done
	return err
}

// Execute executes a command. args, which may be nil, are its arguments. Execute decodes the
// response into result, unless that is nil.
func (q *Conn) Execute(ctx context.Context, command string, args, result any) error {
	if err := q.execute(ctx, command, args, result, nil); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// Descriptor is a descriptor that QEMU received.
type Descriptor struct {
	Set int `json:"fdset-id"` // QEMU opens it as /dev/fdset/Set
	FD  int `json:"fd"`       // its number in QEMU
}

// Pass adds a duplicate of f to a set of QEMU's descriptors: a new set if set is negative.
// When QEMU opens the set's name, it uses the first descriptor in it with the access mode
// that it needs. query-fdsets returns opaque, which describes the descriptor's purpose.
func (q *Conn) Pass(ctx context.Context, f *os.File, set int, opaque string) (Descriptor, error) {
	args := map[string]any{"opaque": opaque}
	if set >= 0 {
		args["fdset-id"] = set
	}
	q.passing.Lock()
	defer q.passing.Unlock()
	var added Descriptor
	if err := q.execute(ctx, "add-fd", args, &added, f); err != nil {
		return Descriptor{}, fmt.Errorf("add-fd: %w", err)
	}
	return added, nil
}

// execute executes a command, and sends file with it unless that is nil.
func (q *Conn) execute(ctx context.Context, command string, args, result any, file *os.File) error {
	answer := make(chan message, 1)
	q.mu.Lock()
	if q.err != nil {
		q.mu.Unlock()
		return q.err
	}
	q.next++
	id := q.next
	q.waiting[id] = answer
	q.mu.Unlock()
	defer func() {
		q.mu.Lock()
		delete(q.waiting, id)
		q.mu.Unlock()
	}()

	text, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return err
	}
	if err := q.write(append(text, '\n'), file); err != nil {
		_ = q.conn.Close() // QEMU may have received a part of the command
		return errors.Join(ErrClosed, err)
	}
	var m message
	select {
	case m = <-answer:
	case <-q.done:
		select {
		case m = <-answer: // the response arrived before the connection ended
		default:
			q.mu.Lock()
			defer q.mu.Unlock()
			return q.err
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	if m.Error != nil {
		return m.Error
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(m.Return, result)
}

// write sends text, and file with its first byte. After an error, the connection is
// unusable.
func (q *Conn) write(text []byte, file *os.File) error {
	q.writing.Lock()
	defer q.writing.Unlock()
	if err := q.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	if file != nil {
		c, ok := q.conn.(*net.UnixConn)
		if !ok {
			return errors.New("cannot send a descriptor over a connection that is not a Unix socket")
		}
		n, _, err := c.WriteMsgUnix(text, unix.UnixRights(int(file.Fd())), nil)
		if err != nil {
			return err
		}
		text = text[n:]
	}
	_, err := q.conn.Write(text)
	return err
}

// readAll dispatches messages until the connection ends.
func (q *Conn) readAll(r *bufio.Reader) {
	defer close(q.done)
	defer close(q.events)
	for {
		m, err := read(r)
		if err != nil {
			q.mu.Lock()
			q.err = ErrClosed
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				q.err = errors.Join(ErrClosed, err)
			}
			q.mu.Unlock()
			_ = q.conn.Close()
			return
		}
		switch {
		case m.Event != "":
			select {
			case q.events <- Event{m.Event, m.Data}:
			default:
			}
		case m.ID != nil:
			q.mu.Lock()
			answer := q.waiting[*m.ID]
			delete(q.waiting, *m.ID) // so that a second response is dropped
			q.mu.Unlock()
			if answer != nil {
				answer <- m
			}
		}
	}
}

// read reads one message: a line of JSON.
func read(r *bufio.Reader) (message, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > maxMessage {
			return message{}, fmt.Errorf("a message has more than %d bytes", maxMessage)
		}
		line = append(line, part...)
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return message{}, err
		}
	}
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("read message: %w", err)
	}
	return m, nil
}
