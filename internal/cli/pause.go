package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

func (a *app) pauseCommand() *cobra.Command {
	return a.turnCommand("pause", "Save sandboxes to disk and stop their VMs", (*client.Client).Pause)
}

func (a *app) resumeCommand() *cobra.Command {
	return a.turnCommand("resume", "Resume paused sandboxes", (*client.Client).Resume)
}

func (a *app) rebootCommand() *cobra.Command {
	cmd := a.turnCommand("reboot", "Restart sandboxes from their disks, without their memory", (*client.Client).Reboot)
	cmd.Long = "Restart running or paused sandboxes from their disks. They lose their processes and everything else in memory, and\n" +
		"keep disk, id, name, tokens, limits and URL. This also works if the guest does not answer."
	return cmd
}

func (a *app) turnCommand(name, short string, f func(*client.Client, context.Context, string) (*client.Sandbox, error)) *cobra.Command {
	return &cobra.Command{
		Use: name + " SANDBOX…", Short: short, Args: atLeast(1), ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.each(args, func(id string) error {
				_, err := f(c, cmd.Context(), id)
				return err
			})
		},
	}
}

func (a *app) forkCommand() *cobra.Command {
	var count int
	var out output
	cmd := &cobra.Command{
		Use: "fork [-n N] SANDBOX", Short: "Copy a running sandbox and print the copies' ids", Args: exactly(1), ValidArgsFunction: a.completeSandbox,
		Long: "Copy a running sandbox, which keeps running. The copies continue from the same moment, with the same processes,\n" +
			"memory and files. Each has its own id, tokens, host name and random numbers.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if count < 1 {
				return usage("-n %d: want at least 1", count)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			made, err := c.Fork(cmd.Context(), args[0], count)
			if err != nil {
				return err
			}
			if out.format == "json" {
				return a.json(made)
			}
			for _, s := range made {
				if _, err := fmt.Fprintln(a.out, s.ID); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().IntVarP(&count, "count", "n", 1, "how many copies")
	out.flag(cmd)
	return cmd
}
