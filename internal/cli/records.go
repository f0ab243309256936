package cli

import (
	"crypto/rand"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

// dayFlag reads a day, "2006-01-02"; empty is zero.
func dayFlag(name, text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	day, err := time.Parse(time.DateOnly, text)
	if err != nil {
		return day, usage("--%s %q: want a day, like 2026-01-31", name, text)
	}
	return day, nil
}

func (a *app) usageCommand() *cobra.Command {
	var from, to string
	var out output
	cmd := &cobra.Command{
		Use: "usage [--from DAY] [--to DAY]", Short: "Show what the team used, by day", Args: exactly(0),
		Long: "Show how long the team's sandboxes ran, times their virtual CPUs and their memory, and how many were started,\n" +
			"by day (UTC), from the first of this month unless said otherwise, and what is stored now.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			first, err := dayFlag("from", from)
			if err != nil {
				return err
			}
			last, err := dayFlag("to", to)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			u, err := c.Usage(cmd.Context(), first, last)
			if err != nil {
				return err
			}
			if out.format == "json" {
				return a.json(u)
			}
			row := func(day string, m client.UsageAmount) []string {
				return []string{day, strconv.FormatFloat(m.VCPUSeconds, 'f', 1, 64), strconv.FormatFloat(m.MemoryGiBSeconds, 'f', 1, 64), strconv.FormatInt(m.SandboxStarts, 10)}
			}
			rows := [][]string{{"DAY", "VCPU-SECONDS", "GIB-SECONDS", "STARTS"}}
			for _, d := range u.Days {
				rows = append(rows, row(d.Day, d.Amount))
			}
			if err := a.table(append(rows, row("total", u.Total))); err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.out, "stored now: %d MiB\n", u.StoredMiB)
			return err
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "first day")
	cmd.Flags().StringVar(&to, "to", "", "last day")
	out.flag(cmd)
	return cmd
}

func (a *app) auditCommand() *cobra.Command {
	var o client.AuditOptions
	var since time.Duration
	var limit int
	var lines bool
	cmd := &cobra.Command{
		Use: "audit", Short: "Show who changed what", Args: exactly(0),
		Long: "Show the team's changes, with who asked for them, from where, and what became of them, and what changed by\n" +
			"itself, newest first.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if since < 0 || limit < 0 {
				return usage("--since and -n must not be negative")
			}
			if since > 0 {
				o.From = time.Now().Add(-since)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			rows := [][]string{{"AT", "ACTOR", "ACTION", "OBJECT", "RESULT", "ADDRESS", "REQUEST"}}
			n := 0
			for r, err := range c.Audit(cmd.Context(), o) {
				if err != nil {
					return err
				}
				if lines {
					if err := a.json(r); err != nil {
						return err
					}
				} else {
					rows = append(rows, []string{r.At.Local().Format(time.DateTime), r.Actor, r.Action, dash(strings.TrimSpace(r.ObjectKind + " " + r.Object)), first(r.Code, r.Result) + times(r.Count), dash(r.Address), dash(r.RequestID)})
				}
				if n++; n == limit {
					break
				}
			}
			if lines {
				return nil
			}
			return a.table(rows)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Actor, "actor", "", "only of a user, key or host (id), or of a kind: user, key, host, platform")
	f.StringVar(&o.Action, "action", "", "only this operation of the API, or event")
	f.StringVar(&o.Object, "object", "", "only of a sandbox, template, … (id or name)")
	f.StringVar(&o.Result, "result", "", "only ok, refused or failed")
	f.DurationVar(&since, "since", 0, "only of the last while, like 24h")
	f.IntVarP(&limit, "limit", "n", 100, "at most this many; 0: all")
	f.BoolVar(&lines, "json", false, "as JSON, one record after the other")
	return cmd
}

func dash(text string) string { return first(text, "-") }

func (a *app) channelCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "channel", Short: "Whom the team wants to be told of what"}
	cmd.AddCommand(a.channelAddCommand(), a.channelLsCommand(), a.channelRmCommand(), a.channelTestCommand(), a.channelConfirmCommand())
	return cmd
}

func (a *app) channelAddCommand() *cobra.Command {
	var o client.ChannelOptions
	var out output
	cmd := &cobra.Command{
		Use: "add --event EVENT… NAME webhook|slack|discord|email URL|ADDRESS", Short: "Have events told, and print the channel's id", Args: exactly(3),
		Long: "Have events told by webhook, to an incoming webhook of Slack or Discord, or by mail. A webhook's messages are\n" +
			"signed with its secret; without --secret one is made, and printed to standard error, once. The recipient of mail\n" +
			"gets a letter with a link that confirms the address, and nothing else until they confirm.\n\n" +
			"Events: sandbox.started, sandbox.paused, sandbox.ended, sandbox.failed, sandbox.missing, sandbox.lost,\n" +
			"sandbox.unresponsive, sandbox.responsive, sandbox.memory_lost, build.finished, quota.reached; for the platform's admins host.unreachable, host.online.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(o.Events) == 0 {
				return usage("want at least one --event")
			}
			o.Name, o.Kind = args[0], args[1]
			made := false
			switch o.Kind {
			case "email":
				o.Address = args[2]
			case "webhook":
				if o.Secret == "" {
					o.Secret, made = rand.Text(), true
				}
				o.URL = args[2]
			case "slack", "discord":
				o.URL = args[2]
			default:
				return usage("%q: want webhook, slack, discord or email", o.Kind)
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
				fmt.Fprintf(a.err, "a letter to %s asks to confirm the address\n", ch.Target)
			}
			return a.made(out, ch, ch.ID)
		},
	}
	cmd.Flags().StringSliceVar(&o.Events, "event", nil, "an event that is told; may be repeated")
	cmd.Flags().StringVar(&o.Secret, "secret", "", "what a webhook's messages are signed with, at least 16 characters")
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
		Use: "confirm CHANNEL…", Short: "Resend the confirmation letters of mail channels", Args: atLeast(1),
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
		Use: "test CHANNEL…", Short: "Send channels a test, and say how that went", Args: atLeast(1),
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

// times says how many requests a record stands for, if it is more than one.
func times(n int64) string {
	if n < 2 {
		return ""
	}
	return fmt.Sprintf(" ×%d", n)
}
