package cli

import (
	"crypto/rand"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

func (a *app) channelCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "channel", Short: "Manage notification channels"}
	cmd.AddCommand(a.channelAddCommand(), a.channelLsCommand(), a.channelRmCommand(), a.channelTestCommand(), a.channelConfirmCommand())
	return cmd
}

func (a *app) channelAddCommand() *cobra.Command {
	var o client.ChannelOptions
	var out output
	cmd := &cobra.Command{
		Use: "add --event EVENT… NAME " + strings.Join(client.ChannelKinds, "|") + " URL|ADDRESS", Short: "Add a channel and print its id", Args: exactly(3),
		Long: "Send notifications to a webhook, to an incoming webhook of Slack or Discord, or by mail. Wrenn signs a webhook's\n" +
			"messages with its secret; without --secret it creates one, and prints it to standard error, once. An e-mail channel\n" +
			"sends nothing but a confirmation link until the recipient has opened it and confirmed the address.\n\n" +
			"Events (those of hosts only for the platform's admins):\n  " + strings.Join(client.ChannelEvents, "\n  "),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(o.Events) == 0 {
				return usage("want at least one --event")
			}
			o.Name, o.Kind = args[0], args[1]
			if !slices.Contains(client.ChannelKinds, o.Kind) {
				return usage("%q is not a kind of channel: want one of %s", o.Kind, strings.Join(client.ChannelKinds, ", "))
			}
			if o.Kind == "email" {
				o.Address = args[2]
			} else {
				o.URL = args[2]
			}
			made := o.Kind == "webhook" && o.Secret == ""
			if made {
				o.Secret = rand.Text()
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			ch, err := c.AddChannel(cmd.Context(), o)
			if err != nil {
				return err
			}
			if made {
				fmt.Fprintf(a.err, "secret: %s\n", o.Secret)
			}
			if ch.Kind == "email" && !ch.Confirmed {
				fmt.Fprintf(a.err, "sent a mail to %s that asks the recipient to confirm the address\n", ch.Target)
			}
			return a.made(out, ch, ch.ID)
		},
	}
	cmd.Flags().StringSliceVar(&o.Events, "event", nil, "event to notify about; repeatable")
	cmd.Flags().StringVar(&o.Secret, "secret", "", "secret that signs a webhook's messages, at least 16 characters")
	out.flag(cmd)
	return cmd
}

func (a *app) channelLsCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "ls", Short: "List channels", Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.Channels(cmd.Context())
			if err != nil {
				return err
			}
			if out.format == "json" {
				return a.json(list)
			}
			rows := [][]string{{"ID", "NAME", "KIND", "TARGET", "STATE", "EVENTS"}}
			for _, ch := range list {
				state := "ok"
				switch {
				case !ch.Enabled:
					state = "disabled"
				case ch.Kind == "email" && !ch.Confirmed:
					state = "unconfirmed"
				case ch.FailingSince != nil:
					state = "failing"
				}
				rows = append(rows, []string{ch.ID, ch.Name, ch.Kind, ch.Target, state, strings.Join(ch.Events, ",")})
			}
			return a.table(rows)
		},
	}
	out.flag(cmd)
	return cmd
}

func (a *app) channelRmCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm CHANNEL…", Short: "Remove channels", Args: atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.each(args, func(id string) error { return c.DeleteChannel(cmd.Context(), id) })
		},
	}
}

func (a *app) channelConfirmCommand() *cobra.Command {
	return &cobra.Command{
		Use: "confirm CHANNEL…", Short: "Resend the confirmation mails of e-mail channels", Args: atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.each(args, func(id string) error { return c.AskConfirmation(cmd.Context(), id) })
		},
	}
}

func (a *app) channelTestCommand() *cobra.Command {
	return &cobra.Command{
		Use: "test CHANNEL…", Short: "Send a test notification, and print the result", Args: atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.each(args, func(id string) error {
				d, err := c.TestChannel(cmd.Context(), id)
				if err != nil {
					return err
				}
				if d.State != "delivered" {
					return fmt.Errorf("not delivered: %s", d.Error)
				}
				_, err = fmt.Fprintf(a.out, "delivered in %d ms\n", d.TookMS)
				return err
			})
		},
	}
}
