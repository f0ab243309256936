package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/cli"
)

// commands are all that wrenn can do.
func commands() []*cobra.Command {
	return cli.Commands(os.Stdin, os.Stdout, os.Stderr)
}
