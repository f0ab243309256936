package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/ballast"
	"github.com/wrenn-dev/wrenn/internal/bounded"
	"github.com/wrenn-dev/wrenn/internal/graceful"
	"github.com/wrenn-dev/wrenn/internal/handover"
	"github.com/wrenn-dev/wrenn/internal/linger"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/patience"
	"github.com/wrenn-dev/wrenn/internal/server"
	"github.com/wrenn-dev/wrenn/internal/settings/all"
	"github.com/wrenn-dev/wrenn/internal/tracing"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

func serverCommand() *cobra.Command {
	return &cobra.Command{
		Use: "server", Short: "Run the control plane", Args: cobra.NoArgs,
		Long: "Run the control plane, until interrupted.\n\n" + all.ServerProgram.Help(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			asked, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			leave := &connectionClose{asked: asked, sleep: time.Sleep}
			ctx, cancel := leave.context()
			defer cancel()
			var c all.Server
			warnings, err := all.Load(all.ServerProgram, &c)
			log, stopLog := openLog(all.ServerProgram, c.Logging, warnings)
			defer stopLog()
			if err != nil {
				return err
			}
			c.Config.Log = log.Logger
			if c.Trace, err = tracing.Open(c.Tracing, all.ServerProgram.Name, version, c.Log); err != nil {
				return err
			}
			defer c.Trace.Stop(c.Log)
			if os.Getenv("GOMEMLIMIT") == "" {
				debug.SetMemoryLimit(c.MemoryLimit())
			}
			ballast.Load()
			s, err := server.New(asked, c.Config)
			if err != nil {
				return err
			}
			context.AfterFunc(ctx, s.Linger)
			handler := leave.handler(s.Handler())
			bound := func(l net.Listener) net.Listener {
				return bounded.Listener(l, bounded.PerAddress, c.TrustedProxies, c.Log)
			}
			run := withMetrics(c.MetricsListen, bound, s.Metrics(), s.Run)
			if network, socket := netaddr.Split(c.Listen); network == "unix" {
				inner := run
				run = func(ctx context.Context) error {
					// The main socket is this server's, so no other server uses this path.
					l, err := handover.Listen(handover.Path(socket), 0o600)
					if err != nil {
						return fmt.Errorf("take connections of the front door: %w", err)
					}
					srv := netaddr.Server(patience.Answers(server.FrontDoor(handler, s.ToPort), patience.Default))
					return serveOn(ctx, bound(linger.Listener(l)), nil, srv, s.ToPort, inner)
				}
			}
			return errors.Join(withProfiles(ctx, c.Operation, func(ctx context.Context) error {
				return serve(ctx, c.Listen, bound, nil, handler, s.ToPort, run)
			}), s.Close())
		},
	}
}

// withMetrics returns a function that serves metrics at listen, without credentials, while
// it runs run. If listen is empty, it returns run.
func withMetrics(listen string, bound func(net.Listener) net.Listener, metrics http.Handler, run func(context.Context) error) func(context.Context) error {
	if listen == "" {
		return run
	}
	return func(ctx context.Context) error { return serve(ctx, listen, bound, nil, metrics, nil, run) }
}

// serve serves handler at listen and calls run, until ctx is done or one of them ends.
// It uses TLS if identity is not nil. Listeners to which strangers connect set bound, which
// limits connections and gives responses a deadline; an agent's listener for its server
// does not. toPort, if it is not nil, selects the requests that [upstream.Server] receives.
func serve(ctx context.Context, listen string, bound func(net.Listener) net.Listener, identity *tls.Config, handler http.Handler, toPort func(*http.Request) bool, run func(context.Context) error) error {
	l, err := netaddr.Listen(ctx, listen, 0o600)
	if err != nil {
		return err
	}
	if bound == nil {
		srv := netaddr.Server(handler)
		netaddr.Separate(srv) // A server sends all its tenants' requests over few connections.
		return serveOn(ctx, l, identity, srv, toPort, run)
	}
	srv := netaddr.Server(patience.Answers(handler, patience.Default))
	return serveOn(ctx, bound(l), identity, srv, toPort, run)
}

// serveOn does the same on the listener l, which it closes, with srv, whose TLS
// configuration and handler it replaces.
func serveOn(ctx context.Context, l net.Listener, identity *tls.Config, srv *http.Server, toPort func(*http.Request) bool, run func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if identity == nil && toPort != nil {
		l = (&upstream.Server{Handler: srv.Handler, Takes: toPort, HeaderTimeout: srv.ReadHeaderTimeout, IdleTimeout: srv.IdleTimeout}).Listen(l)
	}
	ran := make(chan error, 1)
	go func() { ran <- run(ctx); cancel() }()
	err := graceful.Serve(ctx, srv, l, identity, graceful.InFlight)
	cancel()
	if err != nil {
		err = fmt.Errorf("serve: %w", err)
	}
	return errors.Join(err, <-ran)
}
