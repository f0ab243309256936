package cli

import (
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
		Use: "host", Short: "The machines that sandboxes run on",
		Long: "The machines that sandboxes run on. For the platform's admins: these commands log in with $WRENN_EMAIL and $WRENN_PASSWORD, or else what is in DIR/credentials.json.",
	}
	cmd.AddCommand(a.hostAddCommand(), a.hostListCommand(), a.hostTokenCommand(), a.hostDrainCommand(), a.hostRemoveCommand())
	return cmd
}

// registration says how a host's agent is started.
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
		Use: "add NAME", Short: "Make a host, and the token that its agent registers with", Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
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
	cmd.Flags().StringArrayVar(&tags, "tag", nil, "word that sandboxes can ask for; repeatable")
	out.flag(cmd)
	return cmd
}

func (a *app) hostTokenCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "token HOST", Short: "Make another registration token for a host", Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.RenewHostToken(cmd.Context(), args[0])
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
			if err := out.check(); err != nil {
				return err
			}
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
			rows := [][]string{{"ID", "NAME", "STATUS", "SANDBOXES", "MEMORY", "CPUS", "VMM", "TAGS", "URL"}}
			for _, h := range hosts {
				rows = append(rows, []string{
					h.ID, h.Name, h.Status, strconv.Itoa(h.Load.Sandboxes), fmt.Sprintf("%d/%d MiB", h.Load.UsedMemoryMiB, h.CapacityMiB),
					fmt.Sprintf("%d/%d", h.Load.UsedVCPUs, h.CPUs), h.VMM + " " + h.Accelerator, strings.Join(h.Tags, ","), h.URL,
				})
			}
			return a.table(rows)
		},
	}
	out.flag(cmd)
	return cmd
}

func (a *app) hostDrainCommand() *cobra.Command {
	var off bool
	cmd := &cobra.Command{
		Use: "drain HOST", Short: "Place no new sandboxes on a host", Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			h, err := c.DrainHost(cmd.Context(), args[0], !off)
			if err != nil {
				return err
			}
			return a.table([][]string{{h.ID, h.Status}})
		},
	}
	cmd.Flags().BoolVar(&off, "off", false, "place sandboxes on it again")
	return cmd
}

func (a *app) hostRemoveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm HOST", Short: "Remove a host", Args: exactly(1),
		Long: "Remove a host. Where sandboxes or templates would be lost it says which, and does so with --force alone.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if force {
				return c.DeleteHost(cmd.Context(), args[0], true)
			}
			h, err := c.PreviewHost(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if l := h.Loses; l != nil && (len(l.Sandboxes) > 0 || l.Templates > 0) {
				var lost []string
				for _, state := range slices.Sorted(maps.Keys(l.Sandboxes)) {
					lost = append(lost, fmt.Sprintf("%d %s sandboxes", l.Sandboxes[state], state))
				}
				if l.Templates > 0 {
					lost = append(lost, fmt.Sprintf("%d templates that no other host has", l.Templates))
				}
				return fmt.Errorf("with %s (%s) would be lost: %s; --force does it", h.ID, h.Name, strings.Join(lost, ", "))
			}
			return c.DeleteHost(cmd.Context(), args[0], false)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "whatever is lost")
	return cmd
}
