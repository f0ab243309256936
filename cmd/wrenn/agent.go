package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/agent"
	"github.com/wrenn-dev/wrenn/internal/agent/enroll"
	"github.com/wrenn-dev/wrenn/internal/ballast"
	"github.com/wrenn-dev/wrenn/internal/bounded"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/settings/all"
	"github.com/wrenn-dev/wrenn/internal/tracing"
)

func agentCommand() *cobra.Command {
	var flags all.Enrollment
	var listen string
	cmd := &cobra.Command{
		Use: "agent", Short: "Run the host agent", Args: cobra.NoArgs,
		Long: `Run the host agent, which makes this machine a host.

With --server the agent registers with that control plane, the first time with a
token from ` + "`wrenn host add`" + `, and the control plane calls it over mutual TLS. Without
--server the agent only serves this machine, with the token in $WRENN_AGENT_TOKEN.

` + all.AgentProgram.Help(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			asked, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			var c all.Agent
			warnings, err := all.Load(all.AgentProgram, &c)
			log, stopLog := openLog(all.AgentProgram, c.Logging, warnings)
			defer stopLog()
			if err != nil {
				return err
			}
			for _, o := range []struct {
				flag string
				to   *string
			}{{flags.Server, &c.Server}, {flags.HostToken, &c.HostToken}, {flags.URL, &c.URL}, {listen, &c.Listen}} {
				if o.flag != "" {
					*o.to = o.flag
				}
			}
			c.Version, c.Config.Log = version, log.Logger
			if c.Trace, err = tracing.Open(c.Tracing, all.AgentProgram.Name, version, c.Log); err != nil {
				return err
			}
			defer c.Trace.Stop(c.Log)
			return withProfiles(asked, c.Operation, func(asked context.Context) error { return runAgent(asked, c.Config, c.Enrollment) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&flags.Server, "server", "", "URL of the control plane ($WRENN_SERVER_URL)")
	f.StringVar(&flags.HostToken, "token", "", "registration token, for the first start ($WRENN_HOST_TOKEN)")
	f.StringVar(&flags.URL, "url", "", "URL at which the control plane reaches this agent ($WRENN_HOST_URL; default https:// and the address of --listen)")
	f.StringVar(&listen, "listen", "", "address to listen on, host:port or unix:/path ($WRENN_LISTEN)")
	return cmd
}

// runAgent runs an agent until asked is done, which then stops in order.
func runAgent(asked context.Context, c agent.Config, e all.Enrollment) error {
	if c.Listen == "" {
		return errors.New("set the address to listen on with --listen or WRENN_LISTEN: host:port or unix:/path")
	}
	ballast.Load()
	leave := &connectionClose{asked: asked, sleep: time.Sleep}
	ctx, cancel := leave.context()
	defer cancel()
	bound := func(l net.Listener) net.Listener { return bounded.Listener(l, bounded.PerAddress, nil, c.Log) }
	if e.Server == "" {
		if !netaddr.Local(c.Listen) {
			return fmt.Errorf("an agent that listens beyond this machine, on %s, must register with a control plane that has a certificate authority (--server)", c.Listen)
		}
		a, err := agent.New(asked, c)
		if err != nil {
			return err
		}
		return errors.Join(serve(ctx, c.Listen, nil, nil, leave.handler(a.Handler()), a.ToPort, withMetrics(c.MetricsListen, bound, a.Metrics(), a.Run)), a.Close())
	}
	if e.URL == "" {
		e.URL = "https://" + c.Listen
	}
	if !strings.HasPrefix(e.URL, "https://") && !netaddr.Local(c.Listen) {
		return fmt.Errorf("an agent without certificates can only listen on this machine, not on %s: set an https URL (--url)", c.Listen)
	}
	if err := os.MkdirAll(string(c.Dir), 0o755); err != nil {
		return err
	}
	if err := agent.CheckFormats(c.Dir); err != nil {
		return err
	}
	machine, err := agent.Machine(c.Dir, c.Version)
	if err != nil {
		return err
	}
	host, err := enroll.Open(asked, enroll.Config{Dir: c.Dir, Server: e.Server, Token: e.HostToken, URL: e.URL, Log: c.Log}, enroll.StatusOf(machine))
	if err != nil {
		return err
	}
	c.Token = host.AgentToken()
	a, err := agent.New(asked, c)
	if err != nil {
		return err
	}
	c.Log.Info("the agent is registered", "host_id", host.ID(), "url", e.URL)
	return errors.Join(serve(ctx, c.Listen, nil, host.TLS(), leave.handler(a.Handler()), a.ToPort, func(ctx context.Context) error {
		return both(ctx, withMetrics(c.MetricsListen, bound, a.Metrics(), a.Run), func(ctx context.Context) error {
			return host.Run(ctx, func() (enroll.Status, error) {
				m, err := a.Describe()
				if err != nil {
					return enroll.Status{}, err
				}
				return enroll.StatusOf(m), nil
			})
		})
	}), a.Close())
}

// both runs a and b until ctx is done or one of them ends, then waits for the other.
func both(ctx context.Context, a, b func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i, run := range []func(context.Context) error{a, b} {
		wg.Go(func() {
			defer cancel()
			errs[i] = run(ctx)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
