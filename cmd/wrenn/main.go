// Command wrenn runs untrusted code in microVM sandboxes: it is the service
// and its client.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/cli"
)

// version is set when the program is built for a release.
var version = "dev"

func main() {
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
	err := root.Execute()
	var exit *cli.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, "wrenn:", err)
	}
	os.Exit(cli.ExitCode(err))
}
