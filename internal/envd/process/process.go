package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/envd/cgroup"
	"github.com/wrenn-dev/wrenn/internal/envd/fault"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
)

// process is a running process. It has at most three goroutines: run, and a pump for each
// output. They end with the process, except a pump whose pipe a descendant still has open,
// which runs until that is closed.
type process struct {
	svc     *Service
	pid     uint32
	config  *pb.ProcessConfig
	tag     *string
	started time.Time
	os      *os.Process
	group   *cgroup.Group // nil without cgroups
	pidfd   *os.File      // readable when the process has ended; nil if the kernel has no pidfds

	stdin     *os.File // nil: not open
	tty       *os.File // the terminal's master side; nil: no terminal
	inputLock chan struct{}

	mu       sync.Mutex // guards what follows; never held over I/O
	exited   bool       // reaped, so its pid may belong to another process
	timedOut bool
	subs     map[*subscriber]struct{}

	reaped chan struct{}    // closed once exited
	ended  chan struct{}    // closed once end is set: nothing is published after it
	end    *pb.ProcessEvent // its end event
}

// run waits for the process, and then publishes its end and releases what it used.
func (p *process) run(timeout time.Duration, outputs []output) {
	defer p.svc.wg.Done()
	if timeout > 0 {
		t := time.AfterFunc(timeout, func() {
			p.mu.Lock()
			p.timedOut = !p.exited
			p.mu.Unlock()
			p.kill()
		})
		defer t.Stop()
	}
	var pumps sync.WaitGroup
	for _, o := range outputs {
		pumps.Add(1)
		p.svc.wg.Add(1)
		go func() {
			defer p.svc.wg.Done()
			p.pump(o, pumps.Done)
		}()
	}

	state, err := p.wait()
	p.svc.remove(p)
	if p.stdin != nil {
		// Also wakes blocked writers.
		_ = p.stdin.Close()
	}
	close(p.reaped)
	for _, o := range outputs {
		// Wakes a pump that waits for output; from now on it waits at most for grace.
		_ = o.r.SetReadDeadline(time.Unix(1, 0))
	}
	pumps.Wait()

	p.end = p.endEvent(state, err)
	close(p.ended)
	if p.group != nil {
		// Let those who wait for the end run first, even with one processor.
		runtime.Gosched()
		p.group.Close()
		p.svc.cfg.Tree.Prepare()
	}
}

// wait returns when the process has ended. The pid is only safe to use until the process
// is reaped, so reaping holds the same lock as sending signals.
func (p *process) wait() (*os.ProcessState, error) {
	if p.pidfd == nil || !p.awaitPidfd() {
		for {
			err := unix.Waitid(unix.P_PID, int(p.pid), nil, unix.WEXITED|unix.WNOWAIT, nil)
			if err != unix.EINTR {
				break
			}
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.exited = true
	return p.os.Wait()
}

// awaitPidfd returns true when the process has ended, and false if the kernel
// cannot poll a pidfd. It occupies no thread, as a blocking call would.
func (p *process) awaitPidfd() bool {
	defer p.pidfd.Close()
	c, err := p.pidfd.SyscallConn()
	if err != nil {
		return false
	}
	ended := false
	err = c.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		ended = n == 1 && err == nil
		return ended || err != nil && err != unix.EINTR
	})
	return err == nil && ended
}

func (p *process) endEvent(state *os.ProcessState, err error) *pb.ProcessEvent {
	e := &pb.ProcessEvent_EndEvent{ExitCode: -1}
	switch {
	case err != nil:
		e.Status = "unknown"
		e.Error = new(fmt.Sprintf("wait for the process: %v", err))
	default:
		e.ExitCode = int32(state.ExitCode())
		e.Exited = state.Exited()
		e.Status = state.String()
		if !e.Exited {
			e.Error = new(e.Status)
		}
	}
	p.mu.Lock()
	if p.timedOut {
		e.Error = new("timed out")
	}
	p.mu.Unlock()
	return &pb.ProcessEvent{Event: &pb.ProcessEvent_End{End: e}}
}

// kill kills the process and all its descendants. It never blocks.
func (p *process) kill() {
	if err := p.signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.svc.cfg.Log.Error("kill process", "pid", p.pid, "error", err)
	}
}

func (p *process) signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exited {
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("no process with pid %d: %w", p.pid, os.ErrProcessDone))
	}
	if sig == syscall.SIGKILL && p.group != nil && p.group.Kill() == nil {
		return nil
	}
	// The process leads its session and its group.
	err := syscall.Kill(-int(p.pid), sig)
	if err == syscall.ESRCH {
		return nil // the process has ended and was not reaped yet
	}
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	return nil
}

func (p *process) resize(size *pty.Winsize) error {
	if p.tty == nil {
		return failed("the process has no terminal")
	}
	if err := pty.Setsize(p.tty, size); err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}

// lockInput makes the caller the only writer of the process's input.
func (p *process) lockInput(ctx context.Context) error {
	select {
	case p.inputLock <- struct{}{}:
		return nil
	case <-p.reaped:
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("process %d has ended", p.pid))
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *process) input(ctx context.Context, in *pb.ProcessInput) error {
	var f *os.File
	var data []byte
	switch in := in.GetInput().(type) {
	case *pb.ProcessInput_Stdin:
		if f = p.stdin; f == nil {
			return failed("the process has no open standard input")
		}
		data = in.Stdin
	case *pb.ProcessInput_Pty:
		if f = p.tty; f == nil {
			return failed("the process has no terminal")
		}
		data = in.Pty
	default:
		return invalid("input is neither for stdin nor for a pty")
	}
	if err := p.lockInput(ctx); err != nil {
		return err
	}
	defer func() { <-p.inputLock }()

	// A process that does not read must not block the request for ever.
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = f.SetWriteDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	_, err := f.Write(data)
	if !stop() {
		<-interrupted
		_ = f.SetWriteDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ctx.Err()
	case errors.Is(err, unix.EPIPE), errors.Is(err, os.ErrClosed), errors.Is(err, unix.EIO):
		return failed("the process's input is closed")
	}
	return fmt.Errorf("write to process %d: %w", p.pid, err)
}

func (p *process) closeStdin(ctx context.Context) error {
	if p.tty != nil {
		return failed("a terminal's input cannot be closed; send it the byte 0x04")
	}
	if p.stdin == nil {
		return failed("the process has no open standard input")
	}
	if err := p.lockInput(ctx); err != nil {
		return err
	}
	defer func() { <-p.inputLock }()
	if err := p.stdin.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close standard input: %w", err)
	}
	return nil
}

// output is an output of a process, with the function that makes an event of its data.
type output struct {
	r    *os.File
	wrap func([]byte) *pb.ProcessEvent_DataEvent
}

const (
	chunk = 32 << 10 // bytes of output in one event, at most
	// grace is how long descendants may still write to an output after the process has
	// ended, before the end is published.
	grace = 100 * time.Millisecond
	// graceBytes bounds how much they may write then.
	graceBytes = 1 << 20
)

// buffers has the buffers of pumps.
var buffers = sync.Pool{New: func() any { return new([chunk]byte) }}

// pump publishes the output o, and calls flushed when everything that the process itself
// wrote has been published. After that it discards what descendants still write, so that
// they neither block nor get a SIGPIPE.
func (p *process) pump(o output, flushed func()) {
	defer o.r.Close()
	pooled := buffers.Get().(*[chunk]byte)
	defer buffers.Put(pooled)
	buf := pooled[:]
	publish := func(n int) {
		if n > 0 {
			p.publish(&pb.ProcessEvent{Event: &pb.ProcessEvent_Data{Data: o.wrap(append([]byte(nil), buf[:n]...))}})
		}
	}
	var err error
	for err == nil {
		var n int
		n, err = o.r.Read(buf)
		publish(n)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		flushed() // end of file; EIO on a terminal
		return
	}

	// The process has ended. First publish everything in the pipe, however slow the
	// subscribers are. Reads do not wait, because the deadline has passed.
	_ = o.r.SetReadDeadline(time.Time{})
	for left := buffered(o.r); left > 0 && err != io.EOF; {
		var n int
		n, err = o.r.Read(buf[:min(left, chunk)])
		publish(n)
		if n == 0 && err != nil {
			flushed()
			return
		}
		left -= n
	}
	// Then publish what descendants add within grace. Time spent on subscribers does not
	// count.
	left, room := grace, graceBytes
	for err = nil; left > 0 && room > 0; {
		begin := time.Now()
		_ = o.r.SetReadDeadline(begin.Add(left))
		var n int
		n, err = o.r.Read(buf)
		left -= time.Since(begin)
		room -= n
		publish(n)
		if err != nil {
			break
		}
	}
	flushed()
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		_ = o.r.SetReadDeadline(time.Time{})
		for err = nil; err == nil; {
			_, err = o.r.Read(buf)
		}
	}
}

// buffered returns how many bytes can be read from f without waiting.
func buffered(f *os.File) (n int) {
	c, err := f.SyscallConn()
	if err != nil {
		return 0
	}
	_ = c.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	return n
}

// subscriber is a stream that follows a process.
type subscriber struct {
	events chan *pb.ProcessEvent
	left   chan struct{} // closed when the stream has ended
	once   sync.Once
	slow   chan struct{} // closed when the process gave up on the subscriber
}

func newSubscriber() *subscriber {
	return &subscriber{events: make(chan *pb.ProcessEvent, 16), left: make(chan struct{}), slow: make(chan struct{})}
}

// maxSubscribers bounds the streams on one process.
const maxSubscribers = 64

func (p *process) subscribe() (*subscriber, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.subs) >= maxSubscribers {
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("process %d has %d streams already", p.pid, maxSubscribers))
	}
	s := newSubscriber()
	p.subs[s] = struct{}{}
	return s, nil
}

func (p *process) unsubscribe(s *subscriber) {
	p.mu.Lock()
	delete(p.subs, s)
	p.mu.Unlock()
	s.once.Do(func() { close(s.left) })
}

// publish sends an event to every subscriber, and waits for slow ones. Each output has only
// one publisher, so its events stay in order.
func (p *process) publish(e *pb.ProcessEvent) {
	p.mu.Lock()
	subs := make([]*subscriber, 0, len(p.subs))
	for s := range p.subs {
		subs = append(subs, s)
	}
	p.mu.Unlock()
	// Subscribers with room come first, so that the others do not delay them.
	var full []*subscriber
	for _, s := range subs {
		select {
		case s.events <- e:
		default:
			full = append(full, s)
		}
	}
	for _, s := range full {
		p.offer(s, e)
	}
}

// offer waits until s accepts e or leaves. If it delays other subscribers for longer than
// patience, it is dropped.
func (p *process) offer(s *subscriber, e *pb.ProcessEvent) {
	late, stop := p.svc.ticker(patience)
	defer stop()
	for {
		select {
		case s.events <- e:
			return
		case <-s.left:
			return
		case <-late:
			p.mu.Lock()
			_, there := p.subs[s]
			drop := there && len(p.subs) > 1
			if drop {
				delete(p.subs, s)
				close(s.slow)
			}
			p.mu.Unlock()
			if drop || !there {
				return
			}
		}
	}
}

// follow sends a process's events until the process or the stream ends, or ctx is done.
func (p *process) follow(ctx context.Context, s *subscriber, every time.Duration, send func(*pb.ProcessEvent) error) error {
	defer p.unsubscribe(s)
	if err := send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Start{Start: &pb.ProcessEvent_StartEvent{Pid: p.pid}}}); err != nil {
		return err
	}
	idle := time.NewTicker(every)
	defer idle.Stop()
	for {
		select {
		case e := <-s.events:
			if err := send(e); err != nil {
				return err
			}
			idle.Reset(every)
		case <-p.ended:
			return p.finish(s, send)
		case <-s.slow:
			return errDropped
		case <-idle.C:
			if err := send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Keepalive{Keepalive: &pb.ProcessEvent_KeepAlive{}}}); err != nil {
				return err
			}
		case <-ctx.Done():
			return fault.Connect(ctx.Err())
		}
	}
}

// enter counts a process that is about to start. It returns false if the service is
// closing.
func (s *Service) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.wg.Add(1)
	}
	return !s.closed
}

func (s *Service) add(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.byPID[p.pid] = p
	if s.closed {
		p.kill()
	}
}

var errDropped = connect.NewError(connect.CodeResourceExhausted, errors.New("the stream was dropped because its client did not read its events"))

// finish sends the remaining events of a process that has ended.
func (p *process) finish(s *subscriber, send func(*pb.ProcessEvent) error) error {
	for {
		select {
		case e := <-s.events:
			if err := send(e); err != nil {
				return err
			}
			continue
		default:
		}
		select {
		case <-s.slow:
			return errDropped // an end event would claim that the output is complete
		default:
			return send(p.end)
		}
	}
}

func (s *Service) remove(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byPID[p.pid] == p {
		delete(s.byPID, p.pid)
	}
}

// resetOOM gives a process the default OOM score. The daemon itself is exempt from the OOM
// killer, and its children inherit that.
func resetOOM(pid int) {
	// os.WriteFile would make twice as many system calls, and this delays every start.
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	_, _ = unix.Write(fd, []byte("0"))
	_ = unix.Close(fd)
}
