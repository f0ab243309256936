// Command wrenn runs untrusted code in microVM sandboxes. It contains the server, the
// host agent and the client commands.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/cli"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// version is set when the program is built for a release.
var version = "dev"

func main() {
	err := rootCommand().Execute()
	var exit *cli.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.Err != nil) {
		fmt.Fprintln(os.Stderr, "wrenn:", cli.Printable(err.Error())) // an error may quote a guest
	}
	os.Exit(exitCode(err))
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "wrenn",
		Short:         "Run untrusted code in microVM sandboxes on machines you own",
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &cli.UsageError{Err: fmt.Errorf("%w\nusage: %s", err, cmd.UseLine())}
	})
	root.AddCommand(commands()...)
	return root
}

// exitNewer is the exit code of a server or an agent that does not start
// because a later release wrote its data: sysexits' EX_CONFIG. The systemd
// units do not start it again.
const exitNewer = 78

func exitCode(err error) int {
	var data *format.NewerError
	var schema *store.NewerError
	if errors.As(err, &data) || errors.As(err, &schema) {
		return exitNewer
	}
	return cli.ExitCode(err)
}
