package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/cli"
	"github.com/wrenn-dev/wrenn/internal/doctor"
	"github.com/wrenn-dev/wrenn/internal/up"
)

// commands are all that wrenn can do.
func commands() []*cobra.Command {
	return append(cli.Commands(os.Stdin, os.Stdout, os.Stderr),
		up.Command(os.Stdout), doctor.Command(os.Stdout), serverCommand(), agentCommand(), caCommand(os.Stdout))
}
