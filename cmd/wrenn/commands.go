package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/cli"
	"github.com/wrenn-dev/wrenn/internal/doctor"
	"github.com/wrenn-dev/wrenn/internal/up"
)

// commands returns all commands of wrenn.
func commands() []*cobra.Command {
	return append(cli.Commands(os.Stdin, os.Stdout, os.Stderr),
		up.Command(os.Stdout), doctor.Command(os.Stdout), serverCommand(), agentCommand(), caCommand(os.Stdout))
}
