package server

import (
	"log/slog"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/metrictest"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/server/builds"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/notify"
	"github.com/wrenn-dev/wrenn/internal/server/proxy"
	"github.com/wrenn-dev/wrenn/internal/server/reconcile"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// TestMetricsAreDocumented compares docs/metrics.md with the metrics that the server
// registers.
func TestMetricsAreDocumented(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	s := &Server{
		store: &store.Store{}, hosts: &hosts.Registry{}, sandboxes: sandboxes.New(sandboxes.Config{}), builds: &builds.Service{},
		channels: &notify.Service{}, reconcile: reconcile.New(reconcile.Config{}), guard: auth.NewAccessGuard(nil, log),
	}
	px := proxy.New(proxy.Config{Sandboxes: s.sandboxes, Guard: s.guard, Log: log})
	metrictest.Documented(t, "../..", "server", newObservers(budget.New(1), append(s.parts(), px)...).registry)
}
