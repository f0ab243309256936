package cli

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

func (a *app) auditCommand() *cobra.Command {
	var o client.AuditOptions
	var since time.Duration
	var limit int
	var lines bool
	cmd := &cobra.Command{
		Use: "audit", Short: "List audit records", Args: exactly(0),
		Long: "List the team's audit records, newest first: each change with who asked for it, from where, and its result. What a\n" +
			"host or the platform changed by itself is listed too.",
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
	f.StringVar(&o.Actor, "actor", "", "only changes by this user, key or host (id), or by this kind: user, key, host, platform")
	f.StringVar(&o.Action, "action", "", "only this operation of the API, or this event")
	f.StringVar(&o.Object, "object", "", "only changes of this sandbox, template, … (id or name)")
	f.StringVar(&o.Result, "result", "", "only this result: ok, refused or failed")
	f.DurationVar(&since, "since", 0, "only the last period, such as 24h")
	f.IntVarP(&limit, "limit", "n", 100, "at most this many; 0: all")
	f.BoolVar(&lines, "json", false, "print JSON, one record per line")
	return cmd
}

func dash(text string) string { return first(text, "-") }

// times returns how many requests a record stands for, if there are several, or "".
func times(n int64) string {
	if n < 2 {
		return ""
	}
	return fmt.Sprintf(" ×%d", n)
}
