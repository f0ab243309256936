package cli

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

func (a *app) templateCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "template", Short: "Manage templates, from which sandboxes start"}
	cmd.AddCommand(a.templatesCommand("List templates", (*client.Client).Templates), a.templateShowCommand(), a.templateImportCommand(), a.templateBuildCommand(), a.templateRmCommand(), a.templateTagCommand(), a.templateUntagCommand())
	return cmd
}

// templatesCommand returns the command "ls" for the templates that all returns.
func (a *app) templatesCommand(short string, all func(*client.Client, context.Context) iter.Seq2[client.Template, error]) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: short, Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.templates(all(c, cmd.Context()), out.format)
		},
	}
	out.flag(cmd)
	return cmd
}

func (a *app) templates(all iter.Seq2[client.Template, error], format string) error {
	list := []client.Template{}
	for t, err := range all {
		if err != nil {
			return err
		}
		list = append(list, t)
	}
	if format == "json" {
		return a.json(list)
	}
	rows := [][]string{{"NAME", "VERSION", "TAGS", "ID", "SIZE", "CREATED"}}
	for _, t := range list {
		rows = append(rows, []string{t.Name, strconv.Itoa(t.Version), strings.Join(t.Tags, ","), t.ID, fmt.Sprintf("%d MiB", t.SizeBytes>>20), t.CreatedAt.Format(time.DateTime)})
	}
	return a.table(rows)
}

func (a *app) templateShowCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "show TEMPLATE", Short: "Show a template", Args: exactly(1), ValidArgsFunction: a.completeTemplate,
		Long: "Show a template: NAME (its latest version), NAME:TAG, NAME@VERSION or an id.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			t, err := c.Template(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if out.format == "json" {
				return a.json(t)
			}
			any := func(n int, unit string) string {
				if n == 0 {
					return "chosen by each sandbox"
				}
				return strconv.Itoa(n) + unit
			}
			rows := [][]string{
				{"NAME", t.Name},
				{"VERSION", strconv.Itoa(t.Version)},
				{"TAGS", strings.Join(t.Tags, ",")},
				{"ID", t.ID},
				{"TEAM", t.TeamID},
				{"SIZE", fmt.Sprintf("%d MiB", t.SizeBytes>>20)},
				{"CPUS", any(t.VCPUs, "")},
				{"MEMORY", any(t.MemoryMiB, " MiB")},
				{"DISK", any(t.DiskMiB, " MiB at least")},
				{"LIMITS", limits(t.Limits)},
				{"CAPTURED FROM", cmp.Or(t.SandboxID, "-")},
				{"CREATED", t.CreatedAt.Format(time.DateTime)},
			}
			if f := t.FailedImport; f != nil {
				rows = append(rows, []string{"FAILED IMPORT", f.FailedAt.Format(time.DateTime) + ": " + f.Error})
			}
			return a.table(rows)
		},
	}
	out.flag(cmd)
	return cmd
}

// limits returns a template's limits in the words of a recipe's LIMIT.
func limits(l *client.TemplateLimits) string {
	if l == nil {
		return "the host's"
	}
	var words []string
	for _, limit := range []struct {
		name string
		n    int64
	}{{"disk_bytes", l.DiskBytes}, {"disk_ops", l.DiskOps}, {"net_bytes", l.NetBytes}, {"net_packets", l.NetPackets}} {
		if limit.n > 0 {
			words = append(words, fmt.Sprintf("%s=%d", limit.name, limit.n))
		}
	}
	return strings.Join(words, " ")
}

func (a *app) templateRmCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rm TEMPLATE…", Short: "Remove templates, but not sandboxes that started from them", Args: atLeast(1), ValidArgsFunction: a.completeTemplate,
		Long: "Remove templates. NAME removes all its versions; NAME:TAG, NAME@VERSION or an id removes one.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.each(args, func(ref string) error { return c.DeleteTemplate(cmd.Context(), ref) })
		},
	}
}

func (a *app) templateTagCommand() *cobra.Command {
	return &cobra.Command{
		Use: "tag TEMPLATE TAG", Short: "Set a tag to a version of a template", Args: exactly(2), ValidArgsFunction: a.completeTemplate,
		Example: "  wrenn template tag python@3 stable",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			t, err := c.TagTemplate(cmd.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.out, "%s:%s is version %d\n", t.Name, args[1], t.Version)
			return err
		},
	}
}

func (a *app) templateUntagCommand() *cobra.Command {
	return &cobra.Command{
		Use: "untag NAME:TAG…", Short: "Remove tags; a built version without tags is removed when nothing uses it", Args: atLeast(1), ValidArgsFunction: a.completeTemplate,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.each(args, func(ref string) error {
				name, tag, ok := strings.Cut(ref, ":")
				if !ok {
					return usage("%s: want NAME:TAG", ref)
				}
				return c.UntagTemplate(cmd.Context(), name, tag)
			})
		},
	}
}

// completeTemplate completes names, tags and versions of templates.
func (a *app) completeTemplate(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	c, err := a.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for t, err := range c.Templates(cmd.Context()) {
		if err != nil {
			break
		}
		for _, tag := range t.Tags {
			names = append(names, t.Name+":"+tag)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
