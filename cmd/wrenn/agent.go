package main

import (
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/caarlos0/env/v11"
	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/agent"
)

func agentCommand() *cobra.Command {
	return &cobra.Command{
		Use: "agent", Short: "Run the host agent (configured by environment)", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			c, err := env.ParseAs[agent.Config]()
			if err != nil {
				return err
			}
			if c.Listen == "" {
				return errors.New("WRENN_LISTEN must be set: unix:/path or host:port")
			}
			c.Version, c.Log = version, slog.New(slog.NewTextHandler(os.Stderr, nil))
			a, err := agent.New(ctx, c)
			if err != nil {
				return err
			}
			return errors.Join(serve(ctx, c.Listen, a.Handler(), a.Run), a.Close())
		},
	}
}
