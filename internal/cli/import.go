package cli

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// notInNames matches what a template's name cannot have.
var notInNames = regexp.MustCompile(`[^a-z0-9._-]+`)

func (a *app) templateImportCommand() *cobra.Command {
	var o client.ImportOptions
	var fromInput bool
	cmd := &cobra.Command{
		Use: "import [--name NAME] oci:REFERENCE | FILE.tar | FOLDER", Short: "Import an OCI image as a template", Args: exactly(1),
		Long: "Import an OCI image as a template: from a registry, from an archive (the output of `docker save`, or a tar of an\n" +
			"OCI image layout, either may be gzipped), or from the folder of an OCI image layout. The template's sandboxes\n" +
			"have the image's environment, user and working directory, and run its entry point.",
		Example: "  wrenn template import oci:nginx:1.27\n  docker save app:latest | gzip >app.tar.gz && wrenn template import app.tar.gz",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			from := args[0]
			if reference, ok := strings.CutPrefix(from, "oci:"); ok {
				o.Reference = reference
				reference, _, _ = strings.Cut(reference, "@")
				from, _, _ = strings.Cut(path.Base(reference), ":")
			}
			if o.Name == "" {
				base := filepath.Base(filepath.Clean(from))
				for _, suffix := range []string{".gz", ".tgz", ".tar"} {
					base = strings.TrimSuffix(base, suffix)
				}
				o.Name = strings.Trim(notInNames.ReplaceAllString(strings.ToLower(base), "-"), ".-_")
			}
			if fromInput {
				if o.Username == "" {
					return usage("--password-stdin needs --username")
				}
				if o.Password, err = a.readPassword(); err != nil {
					return err
				}
			}
			if o.Reference == "" {
				if o.Username != "" {
					return usage("--username is only for registries")
				}
				archive, closing, err := openImage(from)
				if err != nil {
					return err
				}
				defer func() { err = errors.Join(err, closing()) }()
				o.Archive = archive
			} else if o.Tag != "" {
				return usage("--tag is only for archives and folders; a reference has its own tag")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			t, err := c.Import(cmd.Context(), o)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.out, "%s@%d\n", t.Name, t.Version)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Name, "name", "", "the template's name (default the image's)")
	f.StringVar(&o.Tag, "tag", "", "the image's name in an archive or folder that has several")
	f.StringVarP(&o.Username, "username", "u", "", "user name for the registry")
	f.BoolVar(&fromInput, "password-stdin", false, "read the registry's password from standard input")
	f.IntVar(&o.DiskMiB, "disk", 0, fmt.Sprintf("size of the template's disk in MiB (default %d)", hostwire.DefaultDiskMiB))
	f.BoolVar(&o.Inert, "inert", false, "do not start the image's entry point")
	f.BoolVar(&o.Platform, "platform", false, "share it with all teams; for the platform's admins")
	return cmd
}

// readPassword reads a line from standard input.
func (a *app) readPassword() (string, error) {
	if f, ok := a.in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		b, err := term.ReadPassword(int(f.Fd()))
		if err != nil {
			return "", fmt.Errorf("read password: %w", err)
		}
		return string(b), nil
	}
	line, err := bufio.NewReader(io.LimitReader(a.in, 64<<10)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read password: %w", err)
	}
	return strings.TrimRight(line, "\r\n"), nil
}

// openImage opens an archive, or packs a folder into one while it is read.
func openImage(name string) (r io.Reader, closing func() error, err error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, nil, err
	}
	if !info.IsDir() {
		f, err := os.Open(name)
		if err != nil {
			return nil, nil, err
		}
		return f, f.Close, nil
	}
	if _, err := os.Stat(filepath.Join(name, "index.json")); err != nil {
		return nil, nil, fmt.Errorf("%s is no OCI image layout: %w", name, err)
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() { // ends when the folder is packed, or the reader is closed
		defer close(done)
		w := tar.NewWriter(pw)
		err := w.AddFS(os.DirFS(name))
		pw.CloseWithError(errors.Join(err, w.Close()))
	}()
	return pr, func() error { err := pr.Close(); <-done; return err }, nil
}
