package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/cli"
	"github.com/wrenn-dev/wrenn/internal/doctor"
	"github.com/wrenn-dev/wrenn/internal/settings/all"
	"github.com/wrenn-dev/wrenn/internal/up"
)

// commands returns all commands of wrenn.
func commands() []*cobra.Command {
	return append(clientCommands(os.Stdin, os.Stdout, os.Stderr),
		up.Command(os.Stdout), doctor.Command(os.Stdout), serverCommand(), agentCommand(), caCommand(os.Stdout))
}

// clientCommands returns the client commands, which warn about misspelled settings: if
// WRENN_URL is misspelled, they use the service of this machine.
func clientCommands(in io.Reader, out, errw io.Writer) []*cobra.Command {
	cmds := cli.Commands(in, out, errw)
	for _, c := range cmds {
		c.PersistentPreRun = func(*cobra.Command, []string) {
			for _, w := range all.Misspelled() {
				fmt.Fprintln(errw, "wrenn: warning:", cli.Printable(w))
			}
		}
	}
	return cmds
}
