package cli

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// place is one end of a copy.
type place struct {
	sandbox string // empty: on this machine
	path    string // "-": standard input or output
}

// parsePlace parses "SANDBOX:PATH" or a local path. The part before the colon is a
// sandbox only if it has the form of an id, so file names can have colons.
func parsePlace(s string) (place, error) {
	if before, after, ok := strings.Cut(s, ":"); ok {
		if _, err := id.Parse(id.Sandbox, before); err == nil {
			if after == "" {
				return place{}, usage("%q: no path after the sandbox; use %s:. for the home directory", s, before)
			}
			return place{before, after}, nil
		}
	}
	if s == "" {
		return place{}, usage("an empty path")
	}
	return place{path: s}, nil
}

func (a *app) cpCommand() *cobra.Command {
	var user string
	var raw bool
	var receive client.ReceiveOptions
	cmd := &cobra.Command{
		Use: "cp SOURCE TARGET", Short: "Copy files and folders to or from a sandbox", Args: exactly(2),
		Long: "Copy a file or folder. One of the two is SANDBOX:PATH, where a relative path starts at the user's home\n" +
			"directory; the other is a local path, or - for standard input or output (files only).\n" +
			"If the target is a folder, or ends with /, the source is copied into it; otherwise the copy gets the target's name.\n\n" +
			"A copy from a sandbox writes only its target, and replaces a file there only when the copy is complete. It\n" +
			"refuses a folder that exists unless --merge is given, and skips links that lead outside.",
		RunE: func(cmd *cobra.Command, args []string) error {
			from, err := parsePlace(args[0])
			if err != nil {
				return err
			}
			to, err := parsePlace(args[1])
			if err != nil {
				return err
			}
			if (from.sandbox == "") == (to.sandbox == "") {
				return usage("one of the two must be SANDBOX:PATH")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			if from.sandbox != "" {
				receive.User = user
				return a.download(cmd.Context(), c, from, to.path, receive, raw)
			}
			return a.upload(cmd.Context(), c, from.path, to, user)
		},
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "user in the sandbox, whose rights and home directory apply (default user)")
	cmd.Flags().BoolVar(&receive.Merge, "merge", false, "copy into a local folder that exists, and replace its files that have the same names")
	cmd.Flags().BoolVar(&receive.Links, "links", false, "keep links that lead outside the copy")
	cmd.Flags().Int64Var(&receive.MaxBytes, "max-bytes", client.MaxReceivedBytes, "most bytes to copy from a sandbox")
	rawFlag(cmd, &raw)
	return cmd
}

// isDir reports whether a path in a sandbox is a folder.
func isDir(ctx context.Context, c *client.Client, p place, user string) (bool, error) {
	r, err := c.Exec(ctx, p.sandbox, client.Command{Cmd: "test", Args: []string{"-d", p.path}, User: user}, nil)
	if err != nil {
		return false, err
	}
	return r.ExitCode == 0, nil
}

func (a *app) upload(ctx context.Context, c *client.Client, from string, to place, user string) error {
	if from == "-" {
		_, err := c.WriteFile(ctx, to.sandbox, to.path, user, a.in)
		return err
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	intoDir := strings.HasSuffix(to.path, "/")
	if !intoDir {
		if intoDir, err = isDir(ctx, c, to, user); err != nil {
			return err
		}
	}
	abs, err := filepath.Abs(from) // "." and ".." have names too
	if err != nil {
		return err
	}
	dir, name := to.path, filepath.Base(abs)
	if !intoDir {
		dir, name = path.Split(to.path)
		if dir == "" {
			dir = "."
		}
	}
	if info.Mode().IsRegular() {
		f, err := os.Open(from)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := c.WriteFile(ctx, to.sandbox, path.Join(dir, name), user, f); err != nil {
			return err
		}
		if info.Mode()&0o111 == 0 {
			return nil
		}
		r, err := c.Exec(ctx, to.sandbox, client.Command{Cmd: "chmod", Args: []string{"+x", "--", path.Join(dir, name)}, User: user}, nil)
		if err == nil && r.ExitCode != 0 {
			err = fmt.Errorf("make %s executable: %s", path.Join(dir, name), clean(string(r.Stderr)))
		}
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is neither a file nor a folder", from)
	}
	r, w := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := pack(w, abs, name)
		w.CloseWithError(err)
		packed <- err
	}()
	_, err = c.WriteArchive(ctx, to.sandbox, dir, user, r)
	r.CloseWithError(errors.New("the upload has ended")) // ends pack
	if perr := <-packed; perr != nil && err != nil {
		return errors.Join(err, perr)
	}
	return err
}

// pack writes the folder dir as a tar archive whose top entry is name.
func pack(w io.Writer, dir, name string) error {
	t := tar.NewWriter(w)
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode()&(fs.ModeSocket|fs.ModeNamedPipe|fs.ModeDevice) != 0 {
			return nil // a socket, say, which cannot be copied
		}
		var link string
		if info.Mode()&fs.ModeSymlink != 0 {
			if link, err = os.Readlink(p); err != nil {
				return err
			}
		}
		h, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		h.Name = path.Join(name, filepath.ToSlash(rel))
		if d.IsDir() {
			h.Name += "/"
		}
		h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return nil
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(t, f)
		return err
	})
	if err != nil {
		return err
	}
	return t.Close()
}

// download copies from a sandbox to this machine. [client.Client.Receive] refuses what
// the guest sends beyond that.
func (a *app) download(ctx context.Context, c *client.Client, from place, to string, o client.ReceiveOptions, raw bool) error {
	if to == "-" {
		r, err := c.ReadFile(ctx, from.sandbox, from.path, o.User)
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = io.Copy(a.guest(raw).out, r)
		return err
	}
	target := to
	if info, err := os.Stat(to); err == nil && info.IsDir() {
		// The name is the one that was asked for, never one that the guest sends.
		name := path.Base(path.Clean(from.path))
		if name == "." || name == ".." || name == "/" {
			return usage("%s: %q has no name of its own; give the copy one, as in %s", from.path, from.path, filepath.Join(to, "NAME"))
		}
		target = filepath.Join(to, name)
	} else if strings.HasSuffix(to, "/") {
		return fmt.Errorf("%s: no such folder", to)
	}
	o.Skipped = func(name, why string) { fmt.Fprintf(a.err, "wrenn: skipped %s: %s\n", clean(name), clean(why)) }
	return c.Receive(ctx, from.sandbox, from.path, target, o)
}
