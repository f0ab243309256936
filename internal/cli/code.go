package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

// interpreter is the name of the template whose sandboxes run code.
const interpreter = "code-interpreter"

// takesCode reports whether `wrenn run` takes its arguments as code for sandboxes of a
// template, unless they follow "--".
func takesCode(template string) bool {
	name, _, _ := strings.Cut(template, ":")
	name, _, _ = strings.Cut(name, "@")
	return name == interpreter
}

// coding has the flags of commands that run code.
type coding struct {
	context, out string
	limit        time.Duration
	raw          bool
}

func (o *coding) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.out, "out", "", "folder to save pictures in; wrenn creates it if needed and overwrites nothing in it (default none are saved)")
	rawFlag(cmd, &o.raw)
}

func (a *app) codeCommand() *cobra.Command {
	var o coding
	cmd := &cobra.Command{
		Use: "code SANDBOX [CODE | FILE]", Short: "Run code in a sandbox of the template " + interpreter, Args: counted(cobra.RangeArgs(1, 2)), ValidArgsFunction: a.completeSandbox,
		Long: "Run Python in a sandbox of the template " + interpreter + ": the argument, the file that it names, or standard input. Later\n" +
			"runs see what the code defines. Exits with 1 if the code ends with an exception.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.code(cmd.Context(), c, args[0], args[1:], o)
		},
	}
	o.flags(cmd)
	cmd.Flags().StringVar(&o.context, "context", "", "context to run the code in (default the context \"default\")")
	cmd.Flags().DurationVar(&o.limit, "time-limit", 0, "time after which the code is interrupted (default 5m)")
	return cmd
}

// code runs code in a sandbox, prints its output, and saves its pictures.
func (a *app) code(ctx context.Context, c *client.Client, sandbox string, args []string, o coding) error {
	text, err := a.source(args)
	if err != nil {
		return err
	}
	if o.limit < 0 || o.limit%time.Second != 0 {
		return usage("--time-limit %v: want whole seconds", o.limit)
	}
	if o.out != "" {
		if err := os.MkdirAll(o.out, 0o755); err != nil {
			return err
		}
	}
	failed := false
	saved, shown := pictures{dir: o.out}, a.guest(o.raw)
	err = c.StreamCode(ctx, sandbox, client.Code{Code: text, ContextID: o.context, TimeoutSeconds: int(o.limit / time.Second)}, func(e client.CodeEvent) error {
		switch {
		case e.Stdout != "":
			_, err := io.WriteString(shown.out, e.Stdout)
			return err
		case e.Stderr != "":
			_, err := io.WriteString(shown.err, e.Stderr)
			return err
		case e.Error != nil:
			failed = true
			said := e.Error.Traceback
			if said == "" {
				said = e.Error.Name + ": " + e.Error.Value
			}
			_, err := fmt.Fprintln(a.err, said)
			return err
		case e.Result != nil:
			return a.result(e.Result, shown.out, &saved)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if failed {
		return &ExitError{Code: 1}
	}
	return nil
}

// source returns the code that the arguments give: a file's content, the argument
// itself, or standard input.
func (a *app) source(args []string) (string, error) {
	if len(args) == 0 || args[0] == "-" {
		b, err := io.ReadAll(a.in)
		return string(b), err
	}
	b, err := os.ReadFile(args[0])
	if err == nil {
		return string(b), nil
	}
	// An argument that looks like the name of a Python file is one, even if it is missing.
	if errors.Is(err, fs.ErrNotExist) && filepath.Ext(args[0]) == ".py" && !strings.ContainsAny(args[0], "\n (") {
		return "", err
	}
	return args[0], nil
}

// The most that one run of code saves. The guest decides how much it sends.
const (
	maxPictures     = 1000
	maxPictureBytes = 1 << 30
)

// pictures saves a run's pictures in dir; empty: nowhere.
type pictures struct {
	dir      string
	last     int // number in the name of the last picture
	n, bytes int // saved so far
}

// save writes a picture to a new file, and returns its name.
func (p *pictures) save(suffix string, data []byte) (string, error) {
	if p.n++; p.n > maxPictures {
		return "", fmt.Errorf("the code shows more than %d pictures", maxPictures)
	}
	if p.bytes += len(data); p.bytes > maxPictureBytes {
		return "", fmt.Errorf("the code's pictures have more than %d bytes", maxPictureBytes)
	}
	for {
		p.last++
		name := filepath.Join(p.dir, fmt.Sprintf("chart-%d%s", p.last, suffix))
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644) // O_EXCL follows no link
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		_, err = f.Write(data)
		return name, errors.Join(err, f.Close())
	}
}

// result saves a result's picture, or writes its text to out.
func (a *app) result(r *client.CodeOutput, out io.Writer, to *pictures) error {
	for suffix, data := range map[string][]byte{".png": r.PNG, ".jpeg": r.JPEG, ".svg": []byte(r.SVG), ".pdf": r.PDF} {
		if len(data) == 0 || to.dir == "" {
			continue
		}
		name, err := to.save(suffix, data)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(a.err, "saved "+name)
		return err
	}
	if r.Text == "" {
		return nil
	}
	_, err := fmt.Fprintln(out, r.Text)
	return err
}
