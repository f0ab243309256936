package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

func (a *app) pauseCommand() *cobra.Command {
	return a.turnCommand("pause", "Write sandboxes to disk, memory and all", (*client.Client).Pause)
}

func (a *app) resumeCommand() *cobra.Command {
	return a.turnCommand("resume", "Let paused sandboxes go on", (*client.Client).Resume)
}

func (a *app) rebootCommand() *cobra.Command {
	cmd := a.turnCommand("reboot", "Start sandboxes from their disks, without their memory", (*client.Client).Reboot)
	cmd.Long = "Start running or paused sandboxes from their disks. Processes and all else in memory are lost; disk, id, name,\n" +
		"tokens, limits and URL stay. The guest need not answer."
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
		Long: "Copy a running sandbox, which goes on. The copies go on from the same moment, with the same processes,\n" +
			"memory and files, and each with an id, tokens, host name and random numbers of its own.",
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

func (a *app) snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "snapshot", Short: "Templates captured from sandboxes"}
	cmd.AddCommand(a.snapshotCreateCommand(), a.templatesCommand("List snapshots", (*client.Client).Snapshots), a.snapshotRmCommand())
	return cmd
}

func (a *app) snapshotCreateCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "create SANDBOX NAME", Short: "Capture a sandbox as a template and print its name", Args: exactly(2), ValidArgsFunction: a.completeSandbox,
		Long: "Capture a sandbox, running or paused, which stays as it is. `wrenn create -t NAME` makes sandboxes that\n" +
			"go on from there, memory, processes and all.",
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
		Use: "rm NAME…", Short: "Remove snapshots; sandboxes that started from them go on", Args: atLeast(1), ValidArgsFunction: a.completeSnapshots,
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
