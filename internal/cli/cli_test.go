package cli

import (
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// command returns a root command with only the client commands, for one command line. Its
// standard input is empty.
func command(out, errw io.Writer, args ...string) *cobra.Command {
	root := &cobra.Command{Use: "wrenn", SilenceErrors: true, SilenceUsage: true}
	root.AddCommand(Commands(strings.NewReader(""), out, errw)...)
	root.SetArgs(args)
	return root
}
