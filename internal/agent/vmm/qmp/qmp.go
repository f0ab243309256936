// Package qmp speaks the QEMU Machine Protocol (QEMU's
// docs/interop/qmp-spec.rst): commands and answers as JSON over a stream.
//
// The peer is not trusted: a QEMU that its guest has taken over may say
// anything, so what it sends is bounded in size and checked in form.
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

// maxMessage bounds a message from QEMU, in bytes. The largest that is asked
// for, the console's text, stays far below.
const maxMessage = 4 << 20

// writeTimeout bounds the time that QEMU may take to read a command. One that
// does not read any more must not hold up the agent.
const writeTimeout = 10 * time.Second

// ErrClosed is returned for commands on a connection that has ended.
var ErrClosed = errors.New("the connection to QEMU has ended")

// Error is QEMU's answer to a command that it could not carry out.
type Error struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return "QEMU: " + e.Desc }

// Event is something that QEMU told of by itself.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// message is anything that QEMU may send.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Event    string          `json:"event"`
	Data     json.RawMessage `json:"data"`
	Return   json.RawMessage `json:"return"`
	Error    *Error          `json:"error"`
	ID       *uint64         `json:"id"`
}

// Conn is a connection to a QEMU. Its methods may be called at the same time.
type Conn struct {
	conn   net.Conn
	events chan Event
	done   chan struct{}

	writing sync.Mutex
	passing sync.Mutex // one command with a descriptor at a time: QEMU holds on to one

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan message
	err     error
}

// Dial connects to the socket at path, which may be longer than a socket's
// address, and makes QEMU ready for commands.
func Dial(ctx context.Context, path string) (*Conn, error) {
	// A socket's address holds 107 bytes: the folder is opened and named by
	// its descriptor instead.
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

// NewConn waits for QEMU's greeting on c and makes it ready for commands. c
// is the connection's from then on, unless it fails.
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
		return nil, errors.New("the first message is no greeting")
	}
	q := &Conn{conn: c, events: make(chan Event, 64), done: make(chan struct{}), waiting: map[uint64]chan message{}}
	go q.readAll(r)
	if err := q.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		_ = q.Close()
		return nil, err
	}
	return q, nil
}

// Events are what QEMU tells of by itself; closed with the connection. Those
// that nobody takes are dropped when more than a few wait.
func (q *Conn) Events() <-chan Event { return q.events }

// Close ends the connection. QEMU goes on.
func (q *Conn) Close() error {
	err := q.conn.Close()
	<-q.done
	return err
}

// Execute carries out a command. Its arguments are encoded from args, which
// may be nil, and its answer decoded into result, unless that is nil.
func (q *Conn) Execute(ctx context.Context, command string, args, result any) error {
	if err := q.execute(ctx, command, args, result, nil); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// Descriptor is a descriptor that QEMU has been given.
type Descriptor struct {
	Set int `json:"fdset-id"` // QEMU opens it by the name /dev/fdset/Set
	FD  int `json:"fd"`       // its number in QEMU
}

// Pass gives QEMU a copy of f, to be opened by the name of the set that it is
// added to: a new one, or, when set is not negative, that one. QEMU opens the
// first of a set that was opened for what it wants: reading, writing or both.
// opaque says what it is for, to whoever asks with query-fdsets.
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

// execute carries out a command, with which file goes to QEMU unless it is nil.
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
		_ = q.conn.Close() // part of a command may be written
		return errors.Join(ErrClosed, err)
	}
	var m message
	select {
	case m = <-answer:
	case <-q.done:
		select {
		case m = <-answer: // QEMU answered before the connection ended
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

// write sends text, and file with its first byte. After an error the
// connection is of no use any more.
func (q *Conn) write(text []byte, file *os.File) error {
	q.writing.Lock()
	defer q.writing.Unlock()
	if err := q.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	if file != nil {
		c, ok := q.conn.(*net.UnixConn)
		if !ok {
			return errors.New("descriptors go over unix sockets only")
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

// readAll hands out messages until the connection ends.
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
			delete(q.waiting, *m.ID) // a second answer to one command is nobody's
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
			return message{}, fmt.Errorf("a message is longer than %d bytes", maxMessage)
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
