package cli

import (
	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

func (a *app) snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "snapshot", Short: "Manage snapshots: templates captured from sandboxes"}
	cmd.AddCommand(a.snapshotCreateCommand(), a.templatesCommand("List snapshots", (*client.Client).Snapshots), a.snapshotRmCommand())
	return cmd
}

func (a *app) snapshotCreateCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "create SANDBOX NAME", Short: "Capture a sandbox as a template and print its name", Args: exactly(2), ValidArgsFunction: a.completeSandbox,
		Long: "Capture a running or paused sandbox, which keeps its state. Sandboxes that `wrenn create -t NAME` creates\n" +
			"continue from there, with its memory and processes.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			t, err := c.Snapshot(cmd.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			return a.made(out, t, t.Name)
		},
	}
	out.flag(cmd)
	return cmd
}

func (a *app) snapshotRmCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME…", Short: "Remove snapshots, but not sandboxes that started from them", Args: atLeast(1), ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.each(args, func(name string) error { return c.DeleteSnapshot(cmd.Context(), name) })
		},
	}
}

// completeSnapshots completes names of snapshots.
func (a *app) completeSnapshots(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	c, err := a.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for t, err := range c.Snapshots(cmd.Context()) {
		if err != nil {
			break
		}
		names = append(names, t.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
