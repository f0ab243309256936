package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/wrenn-dev/wrenn/client"
)

// removeTimeout bounds the destruction of the sandbox that `wrenn run` created, which
// an interrupt does not stop.
const removeTimeout = 30 * time.Second

// execution has the flags of commands that run a command in a sandbox.
type execution struct {
	envs        []string
	cwd, user   string
	limit       time.Duration
	interactive bool
	terminal    bool
}

func (o *execution) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.SetInterspersed(false) // flags after CMD belong to CMD
	f.StringVarP(&o.cwd, "workdir", "w", "", "working directory (default the user's home)")
	f.StringVarP(&o.user, "user", "u", "", "user to run as (default user)")
	f.DurationVar(&o.limit, "time-limit", 0, "time after which the command is killed (default none)")
	f.BoolVarP(&o.terminal, "tty", "t", false, "give the command a terminal")
	f.BoolVarP(&o.interactive, "interactive", "i", false, "pass standard input on")
}

// exitCodes is the help text about exit codes.
const exitCodes = "Exits with the command's exit code, with 127 if there is no such command, with 126 if it cannot be executed,\n" +
	"and with 125 if wrenn itself fails."

func (a *app) execCommand() *cobra.Command {
	var o execution
	cmd := &cobra.Command{
		Use: "exec [-it] SANDBOX [--] CMD [ARG…]", Short: "Run a command in a sandbox", Args: atLeast(2), ValidArgsFunction: a.completeSandbox,
		Long: "Run a command in a sandbox.\n" + exitCodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			id, words := args[0], args[1:]
			if words[0] == "--" {
				words = words[1:]
			}
			if len(words) == 0 {
				return usage("no command\nusage: %s", cmd.UseLine())
			}
			return a.stream(cmd.Context(), c, id, o, words)
		},
	}
	o.flags(cmd)
	cmd.Flags().StringArrayVarP(&o.envs, "env", "e", nil, "environment variable, KEY=VALUE; repeatable")
	return cmd
}

func (a *app) runCommand() *cobra.Command {
	var o execution
	var code coding
	var from creation
	cmd := &cobra.Command{
		Use: "run [-t TEMPLATE] [--] CMD [ARG…]", Short: "Run a command in a sandbox of its own",
		Long: "Create a sandbox, run a command in it with standard input, output and exit code passed through, and destroy it.\n" +
			exitCodes + "\n\n" +
			"With -t " + interpreter + ", run Python instead: the argument, the file that it names, or standard input. After --,\n" +
			"arguments are a command again.",
		Args: func(cmd *cobra.Command, args []string) error {
			if takesCode(from.template) && cmd.ArgsLenAtDash() < 0 {
				return counted(cobra.MaximumNArgs(1))(cmd, args)
			}
			return atLeast(1)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			options, err := from.options()
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			// An interrupt cancels the creation. If the service creates the sandbox all the
			// same, its timeout ends it.
			creating, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			s, err := c.Create(creating, options)
			stop()
			if err != nil {
				return err
			}
			defer func() {
				ctx, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), removeTimeout)
				defer cancel()
				if e := c.Delete(ctx, s.ID); e != nil {
					fmt.Fprintf(a.err, "wrenn: %v\n", e)
					if err == nil {
						err = e
					}
				}
			}()
			if takesCode(from.template) && cmd.ArgsLenAtDash() < 0 {
				code.limit = o.limit
				return a.code(cmd.Context(), c, s.ID, args, code)
			}
			return a.stream(cmd.Context(), c, s.ID, o, args)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	from.flags(cmd)
	code.flags(cmd)
	f.StringVarP(&o.cwd, "workdir", "w", "", "working directory (default the user's home)")
	f.StringVarP(&o.user, "user", "u", "", "user to run as (default user)")
	f.DurationVar(&o.limit, "time-limit", 0, "time after which the command is killed (default none)")
	f.BoolVar(&o.terminal, "tty", false, "give the command a terminal")
	o.interactive = true
	return cmd
}

// stream runs a command with this process's standard streams. If the exit code is not
// 0, it returns an ExitError.
func (a *app) stream(ctx context.Context, c *client.Client, id string, o execution, words []string) error {
	envs, err := pairs("env", o.envs)
	if err != nil {
		return err
	}
	if o.limit < 0 || o.limit%time.Second != 0 {
		return usage("--time-limit %v: want whole seconds", o.limit)
	}
	s := client.Stream{
		Command: client.Command{
			Cmd: words[0], Args: words[1:], Envs: envs, Cwd: o.cwd, User: o.user, TimeoutSeconds: int(o.limit / time.Second),
		},
		Stdout: a.raw.out, Stderr: a.raw.err,
	}
	if o.interactive || o.terminal {
		s.Stdin = a.in
	}
	signals, stop := forwardSignals(o.terminal)
	defer stop()
	s.Signals = signals
	if o.terminal {
		restore, err := a.terminal(&s)
		if err != nil {
			return err
		}
		defer restore()
	}
	r, err := c.ExecStream(ctx, id, s)
	if err != nil {
		return cannotRun(err)
	}
	if r.TimedOut {
		fmt.Fprintf(a.raw.err, "wrenn: the command was killed after %v\r\n", o.limit)
	}
	if r.ExitCode != 0 || r.TimedOut {
		code := r.ExitCode
		if code <= 0 || code > 255 {
			code = ExitFailure
		}
		return &ExitError{Code: code}
	}
	return nil
}

// cannotRun turns an error that says that the command does not exist, or cannot be
// executed, into an ExitError with a shell's exit code. It returns other errors unchanged.
func cannotRun(err error) error {
	var refused *client.Error
	if errors.As(err, &refused) {
		switch refused.Code {
		case "command_not_found":
			return &ExitError{exitNotFound, refused}
		case "command_not_executable":
			return &ExitError{exitNotExecutable, refused}
		}
	}
	return err
}

// forwardSignals sends the signals that would end this process to the command instead.
// With a terminal in raw mode, Ctrl-C is input and no signal.
func forwardSignals(terminal bool) (<-chan int, func()) {
	in := make(chan os.Signal, 4)
	signal.Notify(in, syscall.SIGTERM, syscall.SIGHUP)
	if !terminal {
		signal.Notify(in, os.Interrupt)
	}
	out := make(chan int, 4)
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			case s := <-in:
				n := int(s.(syscall.Signal))
				select {
				case out <- n:
				default: // four are waiting: the command ignores them anyway
				}
			}
		}
	})
	return out, func() { signal.Stop(in); close(done); wg.Wait() }
}

// terminal puts this process's terminal into raw mode and follows its size.
func (a *app) terminal(s *client.Stream) (restore func(), err error) {
	f, ok := a.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil, errors.New("standard input is not a terminal: leave out -t")
	}
	fd := int(f.Fd())
	cols, rows, err := term.GetSize(fd)
	if err != nil {
		return nil, fmt.Errorf("terminal's size: %w", err)
	}
	s.Terminal = &client.TerminalSize{Cols: max(cols, 1), Rows: max(rows, 1)}
	old, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("set terminal: %w", err)
	}
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	sizes := make(chan client.TerminalSize, 1)
	s.Resize = sizes
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-changed:
			}
			if cols, rows, err := term.GetSize(fd); err == nil && cols > 0 && rows > 0 {
				select {
				case sizes <- client.TerminalSize{Cols: cols, Rows: rows}:
				case <-done:
					return
				}
			}
		}
	})
	return func() {
		signal.Stop(changed)
		close(done)
		wg.Wait()
		_ = term.Restore(fd, old)
	}, nil
}
