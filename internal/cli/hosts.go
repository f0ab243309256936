package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

func (a *app) hostCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "host", Short: "Manage hosts: the machines that sandboxes run on",
		Long: "Manage hosts: the machines that sandboxes run on. These commands need an API key with the scope platform. HOST is a host's id or name.",
	}
	cmd.AddCommand(a.hostAddCommand(), a.hostListCommand(), a.hostTokenCommand(), a.hostTagCommand(), a.hostDrainCommand(), a.hostUndrainCommand(), a.hostRemoveCommand())
	return cmd
}

// registration prints how to start a host's agent.
func (a *app) registration(out output, r *client.HostRegistration) error {
	if out.format == "json" {
		return a.json(r)
	}
	_, err := fmt.Fprintf(a.out, "%s\n\nOn the new host, as root, until %s:\n\n    wrenn agent --server URL --token %s --listen ADDRESS:7070\n\nURL is where that host reaches this service, ADDRESS the host's own.\n",
		r.Host.ID, r.ExpiresAt.Local().Format(time.DateTime), r.Token)
	return err
}

func (a *app) hostAddCommand() *cobra.Command {
	var tags []string
	var out output
	cmd := &cobra.Command{
		Use: "add NAME", Short: "Add a host, and print the token that its agent registers with", Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.AddHost(cmd.Context(), args[0], tags)
			if err != nil {
				return err
			}
			return a.registration(out, r)
		},
	}
	cmd.Flags().StringArrayVar(&tags, "tag", nil, "tag that sandboxes can require; repeatable")
	out.flag(cmd)
	return cmd
}

func (a *app) hostTokenCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "token HOST", Short: "Create a new registration token for a host", Args: exactly(1), ValidArgsFunction: a.completeHost,
		Long: "Create a new registration token for a host. Its present agent works until the token is used.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			id, err := hostID(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			r, err := c.RenewHostToken(cmd.Context(), id)
			if err != nil {
				return err
			}
			return a.registration(out, r)
		},
	}
	out.flag(cmd)
	return cmd
}

func (a *app) hostListCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "ls", Short: "List hosts", Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			hosts, err := c.Hosts(cmd.Context())
			if err != nil {
				return err
			}
			if out.format == "json" {
				if hosts == nil {
					hosts = []client.Host{}
				}
				return a.json(hosts)
			}
			rows := [][]string{{"ID", "NAME", "STATUS", "SANDBOXES", "MEMORY", "CPUS", "VMM", "TAGS", "URL", "PROBLEMS"}}
			for _, h := range hosts {
				rows = append(rows, []string{
					h.ID, h.Name, h.Status, strconv.Itoa(h.Load.Sandboxes), fmt.Sprintf("%d/%d MiB", h.Load.UsedMemoryMiB, h.CapacityMiB),
					fmt.Sprintf("%d/%d", h.Load.UsedVCPUs, h.CPUs), h.VMM + " " + h.Accelerator, strings.Join(h.Tags, ","), h.URL, kinds(h.Problems),
				})
			}
			if err := a.table(rows); err != nil {
				return err
			}
			for _, h := range hosts {
				for _, p := range h.Problems {
					// The host chose the message.
					fmt.Fprintf(a.err, "%s: %s (since %s)\n", clean(h.Name), clean(p.Message), p.Since.Local().Format(time.DateTime))
				}
			}
			return nil
		},
	}
	out.flag(cmd)
	return cmd
}

// kinds returns the kinds of a host's problems, each once.
func kinds(problems []client.HostProblem) string {
	if len(problems) == 0 {
		return "-"
	}
	var all []string
	for _, p := range problems {
		all = append(all, p.Kind)
	}
	slices.Sort(all)
	return strings.Join(slices.Compact(all), ",")
}

// hostChange returns cmd as a command that changes one host and prints its status.
func (a *app) hostChange(cmd *cobra.Command, change func(ctx context.Context, c *client.Client, id string, args []string) (*client.Host, error)) *cobra.Command {
	cmd.ValidArgsFunction = a.completeHost
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		id, err := hostID(cmd.Context(), c, args[0])
		if err != nil {
			return err
		}
		h, err := change(cmd.Context(), c, id, args[1:])
		if err != nil {
			return err
		}
		return a.table([][]string{{h.ID, h.Name, h.Status, strings.Join(h.Tags, ",")}})
	}
	return cmd
}

func (a *app) hostDrainCommand() *cobra.Command {
	return a.hostChange(&cobra.Command{
		Use: "drain HOST", Short: "Place no new sandboxes on a host, and pause its idle ones", Args: exactly(1),
		Long: `Place no new sandboxes on a host, and pause its idle ones.

Sandboxes in use keep running. The next request or command for a sandbox that was
paused in this way resumes it, on the same host.`,
	}, func(ctx context.Context, c *client.Client, id string, _ []string) (*client.Host, error) {
		return c.DrainHost(ctx, id, true)
	})
}

func (a *app) hostUndrainCommand() *cobra.Command {
	return a.hostChange(&cobra.Command{Use: "undrain HOST", Short: "Place sandboxes on a host again", Args: exactly(1)},
		func(ctx context.Context, c *client.Client, id string, _ []string) (*client.Host, error) {
			return c.DrainHost(ctx, id, false)
		})
}

func (a *app) hostTagCommand() *cobra.Command {
	return a.hostChange(&cobra.Command{
		Use: "tag HOST [TAG...]", Short: "Replace a host's tags", Args: atLeast(1),
		Long: "Replace a host's tags. `wrenn create --host-tag` requires a tag.",
	}, func(ctx context.Context, c *client.Client, id string, tags []string) (*client.Host, error) {
		return c.TagHost(ctx, id, tags)
	})
}

// hostID returns the id of the host that word names, by id or by name.
func hostID(ctx context.Context, c *client.Client, word string) (string, error) {
	if strings.HasPrefix(word, "hst-") {
		return word, nil
	}
	hosts, err := c.Hosts(ctx)
	if err != nil {
		return "", err
	}
	var found []string
	for _, h := range hosts {
		if h.Name == word {
			found = append(found, h.ID)
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("no host is named %q", word)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%d hosts are named %q: use an id: %s", len(found), word, strings.Join(found, ", "))
}

// completeHost completes the first argument to the id of a host.
func (a *app) completeHost(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c, err := a.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	hosts, err := c.Hosts(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ids := make([]string, len(hosts))
	for i, h := range hosts {
		ids[i] = h.ID + "\t" + h.Name + ", " + h.Status
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) hostRemoveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm HOST", Short: "Remove a host", Args: exactly(1), ValidArgsFunction: a.completeHost,
		Long: "Remove a host. If sandboxes or templates would be lost, this lists them and removes the host only with --force.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			id, err := hostID(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			h, err := c.PreviewHost(cmd.Context(), id)
			if err != nil {
				return err
			}
			if lost := loses(h); lost != "" {
				if !force {
					return fmt.Errorf("removing host %s (%s) would lose %s; use --force to remove it anyway", h.ID, clean(h.Name), lost)
				}
				fmt.Fprintf(a.err, "lost: %s\n", lost)
			}
			return c.DeleteHost(cmd.Context(), id, force)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "remove the host even if sandboxes or templates are lost")
	return cmd
}

// loses returns in words what would be lost with a host, or "".
func loses(h *client.Host) string {
	if h.Loses == nil {
		return ""
	}
	count := func(n int64, one, more string) string {
		if n != 1 {
			one = more
		}
		return strconv.FormatInt(n, 10) + " " + one
	}
	var lost []string
	for _, state := range slices.Sorted(maps.Keys(h.Loses.Sandboxes)) {
		lost = append(lost, count(h.Loses.Sandboxes[state], state+" sandbox", state+" sandboxes"))
	}
	if h.Loses.Templates > 0 {
		lost = append(lost, count(h.Loses.Templates, "template", "templates")+" that no other host has")
	}
	return strings.Join(lost, ", ")
}
