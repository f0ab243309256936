package up

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/graceful"
)

const (
	readyTimeout = 60 * time.Second
	// agentReadyTimeout is longer, because apt can take minutes until it gives up on
	// mirrors that do not answer. The agent then starts with the images that it has.
	agentReadyTimeout = 15 * time.Minute
	// operationsTimeout is the server's WRENN_STOP_TIMEOUT.
	operationsTimeout = 15 * time.Second
	// stopTimeout is when a program that does not exit is killed. The server waits for
	// requests and operations, and then writes its last changes.
	stopTimeout = graceful.InFlight + operationsTimeout + 10*time.Second
	// pauseAllTimeout bounds the pause of all sandboxes when `wrenn up` stops.
	pauseAllTimeout = 2 * time.Minute
	// A program that exits is restarted after firstPause. If it exits again soon, the
	// pause doubles each time, up to maxPause.
	firstPause = 500 * time.Millisecond
	maxPause   = 15 * time.Second
	soon       = 30 * time.Second
)

// program is a program that `wrenn up` keeps running.
type program struct {
	name    string
	command func() *exec.Cmd            // returns a new command for each start
	ready   func(context.Context) error // returns when the program answers
	within  time.Duration               // bounds ready; 0: readyTimeout
	quit    syscall.Signal              // asks the program to exit
	reloads bool                        // SIGHUP makes the program read its log's settings again
	// beforeStop, if not nil, is called before the program is stopped for good.
	beforeStop func(context.Context) error
}

// spawner starts processes that end with this one: the kernel sends a
// process its parent-death signal when the thread that started it ends, so
// one thread, which lives as long as this process, starts them all.
type spawner struct {
	work chan func()
}

// importance is the nice value of the service's programs. When processors are short, each
// gets three times as much time as a program with the default value.
const importance = -5

// newSpawner returns a spawner that works until ctx is done. It also marks all
// descriptors of this process, except the standard ones, as close-on-exec.
func newSpawner(ctx context.Context) (*spawner, error) {
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("mark descriptors close-on-exec: %w", err)
	}
	s := &spawner{work: make(chan func())}
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		// Programs inherit the priority. Without permission they keep the default.
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, importance)
		for {
			select {
			case f := <-s.work:
				f()
			case <-ctx.Done():
				return
			}
		}
	}()
	return s, nil
}

func (s *spawner) start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true // Ctrl-C in the terminal must only reach this process
	cmd.SysProcAttr.Pdeathsig = syscall.SIGTERM
	result := make(chan error, 1)
	s.work <- func() { result <- cmd.Start() }
	return <-result
}

// child is a running program.
type child struct {
	program
	spawner *spawner
	log     *logFile
	say     func(format string, args ...any)

	stop    chan struct{} // closed to stop it
	stopped chan struct{} // closed when it has ended for good
	once    sync.Once

	mu  sync.Mutex
	cmd *exec.Cmd
}

// launch starts a program, returns when it is ready, and keeps it running
// until close.
func launch(ctx context.Context, s *spawner, p program, logPath string, say func(string, ...any)) (*child, error) {
	log, err := openLog(logPath)
	if err != nil {
		return nil, err
	}
	c := &child{program: p, spawner: s, log: log, say: say, stop: make(chan struct{}), stopped: make(chan struct{})}
	ended, err := c.start()
	if err == nil {
		err = c.await(ctx, ended)
	}
	if err != nil {
		c.end(ended)
		return nil, errors.Join(fmt.Errorf("%s: %w", p.name, err), log.Close())
	}
	go c.keep(ctx, ended)
	return c, nil
}

// start starts the process. The channel is closed when it has ended.
func (c *child) start() (<-chan struct{}, error) {
	cmd := c.command()
	cmd.Stdout, cmd.Stderr = c.log, c.log
	cmd.WaitDelay = 2 * time.Second // descendants may hold the log's pipe
	if err := c.spawner.start(cmd); err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.cmd = cmd
	c.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // ProcessState has the result
	}()
	return ended, nil
}

// await returns when the process is ready.
func (c *child) await(ctx context.Context, ended <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(c.within, readyTimeout))
	defer cancel()
	result := make(chan error, 1)
	go func() { result <- c.ready(ctx) }()
	select {
	case err := <-result:
		if err != nil {
			return fmt.Errorf("it does not answer: %w\n%s", err, c.log.tail())
		}
		return nil
	case <-ended:
		cancel()
		<-result
		return fmt.Errorf("it ended (%s)\n%s", c.cmd.ProcessState, c.log.tail())
	case <-c.stop:
		cancel()
		<-result
		return errors.New("it was stopped before it was ready")
	}
}

// keep restarts the program whenever it exits, until close is called.
func (c *child) keep(ctx context.Context, ended <-chan struct{}) {
	defer close(c.stopped)
	pauses, started := backoff.New(firstPause, maxPause), time.Now()
	for {
		select {
		case <-ended:
		case <-c.stop:
			c.runBeforeStop(ctx)
			c.end(ended)
			return
		}
		if time.Since(started) > soon {
			pauses.Reset()
		}
		c.say("%s exited (%s), restarting it", c.name, c.cmd.ProcessState)
		for {
			select {
			case <-time.After(pauses.Next()):
			case <-c.stop:
				return
			}
			started = time.Now()
			next, err := c.start()
			if err == nil {
				if err = c.await(ctx, next); err == nil {
					ended = next
					break
				}
				c.end(next)
			}
			c.say("%s: %v", c.name, err)
		}
		c.say("%s is back", c.name)
	}
}

// runBeforeStop calls the program's beforeStop.
func (c *child) runBeforeStop(ctx context.Context) {
	if c.beforeStop == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pauseAllTimeout)
	defer cancel()
	if err := c.beforeStop(ctx); err != nil {
		c.say("%s: %v", c.name, err)
	}
}

// end asks the process to exit, and kills it if it does not.
func (c *child) end(ended <-chan struct{}) {
	if ended == nil {
		return
	}
	_ = c.cmd.Process.Signal(c.quit)
	select {
	case <-ended:
		return
	case <-time.After(stopTimeout):
	}
	c.say("%s does not exit: killing it", c.name)
	_ = c.cmd.Process.Signal(os.Kill)
	<-ended
}

// signal sends a signal to the process, if it runs.
func (c *child) signal(sig syscall.Signal) {
	c.mu.Lock()
	cmd := c.cmd
	c.mu.Unlock()
	_ = cmd.Process.Signal(sig) // an error says that the process has ended
}

// close stops the program for good.
func (c *child) close() {
	c.once.Do(func() { close(c.stop) })
	<-c.stopped
	_ = c.log.Close()
}

// poll calls probe until it succeeds, for programs that do not report when they are
// ready.
func poll(ctx context.Context, probe func(context.Context) error) error {
	for {
		err := probe(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
