package cli

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// creation has the flags of commands that create sandboxes.
type creation struct {
	template               string
	vcpus, memoryMiB, disk int
	timeout                time.Duration
	onTimeout              string
	autoResume             *bool
	envs, metadata         []string
	hostTags               []string
}

func (o *creation) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&o.template, "template", "t", "", "template to start from (default minimal)")
	f.IntVar(&o.vcpus, "cpus", 0, fmt.Sprintf("virtual CPUs (default the template's, else %d)", hostwire.DefaultVCPUs))
	f.IntVar(&o.memoryMiB, "memory", 0, fmt.Sprintf("memory in MiB (default the template's, else %d)", hostwire.DefaultMemoryMiB))
	f.IntVar(&o.disk, "disk", 0, "disk in MiB (default the template's)")
	f.DurationVar(&o.timeout, "timeout", 5*time.Minute, "idle time after which the sandbox is destroyed or paused; 0: never")
	f.StringVar(&o.onTimeout, "on-timeout", client.DestroyOnTimeout, "what to do after that time: destroy or pause")
	_ = cmd.RegisterFlagCompletionFunc("on-timeout", cobra.FixedCompletions([]string{client.DestroyOnTimeout, client.PauseOnTimeout}, cobra.ShellCompDirectiveNoFileComp))
	f.BoolFunc("auto-resume", "resume it at the next request or command while it is paused (default with --on-timeout pause)", func(s string) error {
		is, err := strconv.ParseBool(s)
		o.autoResume = &is
		return err
	})
	f.StringArrayVarP(&o.envs, "env", "e", nil, "environment variable of every command, KEY=VALUE; repeatable")
	f.StringArrayVar(&o.hostTags, "host-tag", nil, "tag that the host must have; repeatable")
	f.StringArrayVar(&o.metadata, "metadata", nil, "metadata that `wrenn ls` can search, KEY=VALUE; repeatable")
}

func (o *creation) options() (client.CreateOptions, error) {
	envs, err := pairs("env", o.envs)
	if err != nil {
		return client.CreateOptions{}, err
	}
	metadata, err := pairs("metadata", o.metadata)
	if err != nil {
		return client.CreateOptions{}, err
	}
	if o.timeout < 0 || o.timeout%time.Second != 0 {
		return client.CreateOptions{}, usage("--timeout %v: want whole seconds", o.timeout)
	}
	if o.onTimeout != client.DestroyOnTimeout && o.onTimeout != client.PauseOnTimeout {
		return client.CreateOptions{}, usage("--on-timeout %s: want destroy or pause", o.onTimeout)
	}
	seconds := int(o.timeout / time.Second)
	return client.CreateOptions{
		Template: o.template, VCPUs: o.vcpus, MemoryMiB: o.memoryMiB, DiskMiB: o.disk,
		TimeoutSeconds: &seconds, OnTimeout: o.onTimeout, AutoResume: o.autoResume, Envs: envs, Metadata: metadata, HostTags: o.hostTags,
	}, nil
}

func (a *app) createCommand() *cobra.Command {
	var o creation
	var out output
	cmd := &cobra.Command{
		Use: "create", Short: "Create a sandbox and print its id", Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			options, err := o.options()
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.Create(cmd.Context(), options)
			if err != nil {
				return err
			}
			return a.made(out, s, s.ID)
		},
	}
	o.flags(cmd)
	out.flag(cmd)
	return cmd
}

func (a *app) lsCommand() *cobra.Command {
	var out output
	var states, metadata []string
	var all bool
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List sandboxes", Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			meta, err := pairs("metadata", metadata)
			if err != nil {
				return err
			}
			if all {
				states = client.States
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			list := []client.Sandbox{}
			for s, err := range c.List(cmd.Context(), client.ListOptions{States: states, Metadata: meta}) {
				if err != nil {
					return err
				}
				list = append(list, s)
			}
			if out.format == "json" {
				return a.json(list)
			}
			rows := [][]string{{"ID", "TEMPLATE", "STATE", "CPUS", "MEMORY", "CREATED", "EXPIRES"}}
			for _, s := range list {
				rows = append(rows, []string{
					s.ID, s.Template, state(s), strconv.Itoa(s.VCPUs), fmt.Sprintf("%d MiB", s.MemoryMiB),
					since(s.CreatedAt) + " ago", expires(s),
				})
			}
			return a.table(rows)
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&states, "state", nil, "only sandboxes in this state; repeatable")
	f.StringArrayVar(&metadata, "metadata", nil, "only sandboxes with this KEY=VALUE; repeatable")
	f.BoolVar(&all, "all", false, "include sandboxes that have ended")
	out.flag(cmd)
	return cmd
}

func since(t time.Time) string { return time.Since(t).Round(time.Second).String() }

// state returns a sandbox's state with its condition.
func state(s client.Sandbox) string {
	switch {
	case s.Condition == nil:
		return s.State
	case s.Condition.Kind == client.MemoryLost:
		return s.State + " (memory lost: " + s.Condition.Reason + ")"
	}
	return s.State + " (" + s.Condition.Kind + ")"
}

func (a *app) getCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "get SANDBOX", Aliases: []string{"inspect"}, Short: "Show a sandbox", Args: exactly(1), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.Get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if out.format == "json" {
				return a.json(s)
			}
			rows := [][]string{
				{"ID", s.ID},
				{"TEMPLATE", s.Template},
				{"STATE", state(*s)},
				{"CPUS", strconv.Itoa(s.VCPUs)},
				{"MEMORY", fmt.Sprintf("%d MiB", s.MemoryMiB)},
				{"DISK", fmt.Sprintf("%d MiB", s.DiskMiB)},
				{"HOST", s.HostID},
				{"CREATED", since(s.CreatedAt) + " ago"},
			}
			if s.EndedAt == nil {
				rows = append(rows, []string{"EXPIRES", expires(*s)})
			} else {
				rows = append(rows, []string{"ENDED", since(*s.EndedAt) + " ago: " + s.EndedBecause})
			}
			if s.Condition != nil {
				rows = append(rows, []string{"CONDITION", fmt.Sprintf("%s for %s: %s", s.Condition.Reason, since(s.Condition.Since), s.Condition.Message)})
			}
			if s.Error != "" {
				rows = append(rows, []string{"ERROR", s.Error})
			}
			return a.table(rows)
		},
	}
	out.flag(cmd)
	return cmd
}

func expires(s client.Sandbox) string {
	switch {
	case s.EndedAt != nil:
		return s.EndedBecause
	case s.ExpiresAt == nil:
		return "never"
	}
	return "in " + time.Until(*s.ExpiresAt).Round(time.Second).String()
}

func (a *app) rmCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "rm SANDBOX…", Short: "Destroy sandboxes", ValidArgsFunction: a.completeSandboxes,
		Args: func(cmd *cobra.Command, args []string) error {
			if all != (len(args) == 0) {
				return usage("name sandboxes, or use --all")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if all {
				for s, err := range c.List(cmd.Context(), client.ListOptions{}) {
					if err != nil {
						return err
					}
					args = append(args, s.ID)
				}
			}
			return a.each(args, func(id string) error { return c.Delete(cmd.Context(), id) })
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every sandbox of the team")
	return cmd
}

// each calls f for each name, prints the names for which f succeeds, and returns the
// errors of the others.
func (a *app) each(names []string, f func(name string) error) error {
	var errs []error
	for _, name := range names {
		if err := f(name); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			continue
		}
		fmt.Fprintln(a.out, name)
	}
	return errors.Join(errs...)
}

func (a *app) urlCommand() *cobra.Command {
	return &cobra.Command{
		Use: "url SANDBOX PORT", Short: "Print the URL of a sandbox's port", Args: exactly(2), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			port, err := strconv.Atoi(args[1])
			if err != nil || port < 1 || port > 65535 {
				return usage("port %q: want 1 to 65535", args[1])
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.Get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.out, c.URL(s, port))
			return err
		},
	}
}

func (a *app) logsCommand() *cobra.Command {
	var raw bool
	cmd := &cobra.Command{
		Use: "logs SANDBOX", Short: "Print the end of a sandbox's console", Args: exactly(1), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			b, err := c.Logs(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			to := a.out
			if raw {
				to = a.raw.out
			}
			_, err = to.Write(b)
			return err
		},
	}
	rawFlag(cmd, &raw)
	return cmd
}

func (a *app) pingCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ping SANDBOX", Short: "Restart a sandbox's timeout", Args: exactly(1), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.Ping(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.out, "expires", expires(*s))
			return err
		},
	}
}

func (a *app) revokeCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "revoke SANDBOX", Short: "Replace a sandbox's tokens", Args: exactly(1), ValidArgsFunction: a.completeSandbox,
		Long: "Replace the access token and the traffic token of a sandbox. The old ones, and file URLs signed with\n" +
			"them, stop working at once, and connections that they opened are closed. `-o json` prints the new ones.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.RevokeTokens(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.made(out, s, s.ID)
		},
	}
	out.flag(cmd)
	return cmd
}

func (a *app) metricsCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "metrics SANDBOX", Short: "Print the resources that a sandbox uses", Args: exactly(1), ValidArgsFunction: a.completeSandbox,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			m, err := c.Metrics(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if out.format == "json" {
				return a.json(m)
			}
			mib := func(n int64) string { return strconv.FormatInt(n>>20, 10) + " MiB" }
			return a.table([][]string{
				{"CPU", fmt.Sprintf("%.1f %% of %d", m.CPUUsedPct, m.CPUCount)},
				{"MEMORY", mib(m.MemoryUsedBytes) + " of " + mib(m.MemoryTotalBytes)},
				{"DISK", mib(m.DiskUsedBytes) + " of " + mib(m.DiskTotalBytes)},
				{"HOST MEMORY", mib(m.HostMemoryBytes)},
			})
		},
	}
	out.flag(cmd)
	return cmd
}
