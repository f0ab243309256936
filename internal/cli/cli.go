// Package cli has Wrenn's client commands. They call the service only through the
// package client.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"text/tabwriter"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// Exit codes of wrenn itself. Any other exit code comes from a command in a sandbox, or
// is what a shell returns for a command that cannot be run.
const (
	ExitUsage         = 2
	ExitFailure       = 125
	exitNotExecutable = 126
	exitNotFound      = 127
)

// ExitError carries the exit code of a command in a sandbox.
type ExitError struct {
	Code int
	// Err says why the command could not run (nil: it ran).
	Err error
}

func (e *ExitError) Error() string {
	if e.Err != nil {
		return e.Err.Error()
	}
	return fmt.Sprintf("exit code %d", e.Code)
}

// Unwrap returns Err.
func (e *ExitError) Unwrap() error { return e.Err }

// UsageError reports a wrong command line.
type UsageError struct{ Err error }

func (e *UsageError) Error() string { return e.Err.Error() }
func (e *UsageError) Unwrap() error { return e.Err }

func usage(format string, args ...any) error { return &UsageError{fmt.Errorf(format, args...)} }

// ExitCode returns the program's exit code for err.
func ExitCode(err error) int {
	var exit *ExitError
	var bad *UsageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.Code
	case errors.As(err, &bad):
		return ExitUsage
	}
	return ExitFailure
}

// streams are the process's standard streams.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// app holds the streams and the flags that all commands share.
type app struct {
	url, key, dir string
	// Commands write to streams, which replace control characters, because a guest or a
	// tenant may have chosen them. Only what a user asked to get unchanged goes to raw.
	streams
	raw streams
}

// Commands returns the client commands, which read and write the given streams.
func Commands(in io.Reader, out, errw io.Writer) []*cobra.Command {
	a := &app{streams: streams{in, &filter{to: out}, &filter{to: errw}}, raw: streams{in, out, errw}}
	cmds := []*cobra.Command{
		a.runCommand(), a.codeCommand(), a.createCommand(), a.lsCommand(), a.getCommand(), a.execCommand(), a.cpCommand(), a.rmCommand(),
		a.pauseCommand(), a.resumeCommand(), a.rebootCommand(), a.forkCommand(), a.snapshotCommand(),
		a.urlCommand(), a.logsCommand(), a.pingCommand(), a.revokeCommand(), a.metricsCommand(), a.templateCommand(), a.buildCommand(),
		a.hostCommand(),
		a.usageCommand(), a.auditCommand(), a.channelCommand(),
		a.loginCommand(), a.logoutCommand(), a.keyCommand(), a.teamCommand(),
	}
	for _, c := range cmds {
		f := c.PersistentFlags()
		f.StringVar(&a.url, "url", "", "the service's URL (default $WRENN_URL, else that of `wrenn login`, else the one in DIR/credentials.json)")
		f.StringVar(&a.key, "api-key", "", "API key (default $WRENN_API_KEY, else that of `wrenn login`, else the one in DIR/credentials.json)")
		f.StringVar(&a.dir, "dir", "", "data directory of `wrenn up` on this machine (default $WRENN_DIR, else "+layout.DefaultDir+")")
	}
	return cmds
}

// agent is the User-Agent of the commands.
const agent = "wrenn-cli"

// client returns a client of the service that the commands use.
func (a *app) client() (*client.Client, error) {
	url, key, err := a.service()
	if err != nil {
		return nil, err
	}
	c, err := client.New(url, key, client.WithUserAgent(agent))
	if err != nil {
		return nil, &UsageError{err}
	}
	return c, nil
}

// service returns the URL and the API key. It looks for each in the flags, the
// environment, the user's login and the credentials of this machine's `wrenn up`, in
// this order.
func (a *app) service() (url, key string, err error) {
	url, key = first(a.url, os.Getenv("WRENN_URL")), first(a.key, os.Getenv("WRENN_API_KEY"))
	if (url == "" || key == "") && !a.here() {
		l, err := readLogin()
		if err != nil {
			return "", "", err
		}
		// A login's key is for its own service.
		if l != nil && (url == "" || sameService(url, l.URL)) {
			url, key = l.URL, first(key, l.APIKey)
		}
	}
	if url == "" || key == "" {
		have, err := a.credentials()
		if err != nil {
			return "", "", err
		}
		if url != "" && !sameService(url, have.URL) {
			return "", "", fmt.Errorf("there is no API key for %s: the one on this machine is for %s; set WRENN_API_KEY or use `wrenn login`", url, have.URL)
		}
		url, key = first(url, have.URL), first(key, have.APIKey)
	}
	return url, key, nil
}

// sameService reports whether two URLs name one service. A secret is only ever
// sent to the service that it is for.
func sameService(a, b string) bool { return strings.TrimRight(a, "/") == strings.TrimRight(b, "/") }

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// exactly, atLeast and noMore check how many arguments there are.
func exactly(n int) cobra.PositionalArgs { return counted(cobra.ExactArgs(n)) }
func atLeast(n int) cobra.PositionalArgs { return counted(cobra.MinimumNArgs(n)) }
func noMore(n int) cobra.PositionalArgs  { return counted(cobra.MaximumNArgs(n)) }

func counted(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return &UsageError{fmt.Errorf("%w\nusage: %s", err, cmd.UseLine())}
		}
		return nil
	}
}

// output is the value of the -o flag.
type output struct{ format string }

// flag adds -o to a command, and checks its value before the command runs.
func (o *output) flag(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.format, "output", "o", "table", "table or json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if o.format != "table" && o.format != "json" {
			return usage("-o %s: want table or json", o.format)
		}
		return nil
	}
}

func (a *app) json(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	// JSON leaves some control characters unescaped.
	var escaped strings.Builder
	for _, r := range string(b) {
		if r != '\n' && controls(r) {
			fmt.Fprintf(&escaped, `\u%04x`, r)
		} else {
			escaped.WriteRune(r)
		}
	}
	_, err = fmt.Fprintln(a.out, escaped.String())
	return err
}

// made prints something that was created: its name, or all of it as JSON.
func (a *app) made(out output, what any, name string) error {
	if out.format == "json" {
		return a.json(what)
	}
	_, err := fmt.Fprintln(a.out, name)
	return err
}

// table prints rows, of which the first one is the header.
func (a *app) table(rows [][]string) error {
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, clean(strings.Join(r, "\t")))
	}
	return w.Flush()
}

// controls reports whether a character could control a terminal, or, because it is
// bidirectional, make text look different.
func controls(r rune) bool { return unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) }

// clean replaces control characters in untrusted text.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r != '\t' && controls(r) {
			return '?'
		}
		return r
	}, s)
}

// Printable is clean for text of several lines.
func Printable(s string) string {
	lines := strings.Split(strings.ReplaceAll(s, "\r\n", "\n"), "\n")
	for i, line := range lines {
		lines[i] = clean(line)
	}
	return strings.Join(lines, "\n")
}

// filter is a writer that passes text on to another one as [Printable] changes it. It
// keeps an incomplete character, or a carriage return, at the end until the next Write.
type filter struct {
	to io.Writer

	mu   sync.Mutex
	rest string
}

// Write implements [io.Writer].
func (f *filter) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.rest + string(p)
	end := len(s)
	for i := end - 1; i >= 0 && i >= end-utf8.UTFMax; i-- {
		if utf8.RuneStart(s[i]) {
			if s[i] == '\r' || !utf8.FullRuneInString(s[i:]) {
				end = i
			}
			break
		}
	}
	f.rest = s[end:]
	if end == 0 {
		return len(p), nil
	}
	if _, err := io.WriteString(f.to, Printable(s[:end])); err != nil {
		return 0, err
	}
	return len(p), nil
}

// guest returns the streams for what a guest's program printed or wrote. They are
// unchanged if raw is set, or if no terminal shows them.
func (a *app) guest(raw bool) streams {
	choose := func(unchanged, filtered io.Writer) io.Writer {
		if f, ok := unchanged.(*os.File); !raw && ok && term.IsTerminal(int(f.Fd())) {
			return filtered
		}
		return unchanged
	}
	return streams{a.in, choose(a.raw.out, a.out), choose(a.raw.err, a.err)}
}

// rawFlag adds --raw to a command.
func rawFlag(cmd *cobra.Command, raw *bool) {
	cmd.Flags().BoolVar(raw, "raw", false, "keep control characters, with which the guest can control your terminal")
}

// pairs reads KEY=VALUE words.
func pairs(flag string, words []string) (map[string]string, error) {
	m := map[string]string{}
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		if !ok || k == "" {
			return nil, usage("--%s %q: want KEY=VALUE", flag, w)
		}
		m[k] = v
	}
	return m, nil
}

// completeSandbox completes the first argument to the id of a sandbox that has not
// ended.
func (a *app) completeSandbox(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return a.completeSandboxes(cmd, args, word)
}

// completeSandboxes completes every argument to the id of a sandbox that has not ended.
func (a *app) completeSandboxes(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.sandboxIDs(cmd.Context()), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) sandboxIDs(ctx context.Context) []string {
	c, err := a.client()
	if err != nil {
		return nil
	}
	var ids []string
	for s, err := range c.List(ctx, client.ListOptions{}) {
		if err != nil {
			return nil
		}
		ids = append(ids, s.ID+"\t"+s.Template+", "+s.State)
	}
	return ids
}
