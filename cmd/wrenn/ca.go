package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/pki"
)

func caCommand(out io.Writer) *cobra.Command {
	ca := &cobra.Command{Use: "ca", Short: "Manage the certificate authority of an installation with several hosts"}
	var dir string
	create := &cobra.Command{
		Use: "init", Short: "Create a certificate authority", Args: cobra.NoArgs,
		Long: "Create a certificate authority in two new files, ca.crt and ca.key, which only their owner may read. All servers of an installation use the same one.",
		RunE: func(*cobra.Command, []string) error {
			authority, err := pki.NewAuthority()
			if err != nil {
				return err
			}
			abs, err := filepath.Abs(dir)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(abs, 0o700); err != nil {
				return err
			}
			cert, key := filepath.Join(abs, "ca.crt"), filepath.Join(abs, "ca.key")
			if err := authority.Save(cert, key); err != nil {
				return err
			}
			_, err = fmt.Fprintf(out, "WRENN_CA_CERT=%s\nWRENN_CA_KEY=%s\n", cert, key)
			return err
		},
	}
	create.Flags().StringVar(&dir, "dir", ".", "directory for the files")
	ca.AddCommand(create)
	return ca
}
