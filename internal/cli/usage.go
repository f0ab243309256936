package cli

import (
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

// dayFlag parses a day, "2006-01-02" (empty: the zero time).
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
		Long: "Show by day (UTC) how long the team's sandboxes ran, multiplied by their vCPUs and by their memory, and how many\n" +
			"were started; and how much the team stores now. The default is this month.",
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
