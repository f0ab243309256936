package agent

import (
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/proxy"
	"github.com/wrenn-dev/wrenn/internal/metrictest"
)

// TestMetricsAreDocumented compares docs/metrics.md with the metrics that the agent
// registers.
func TestMetricsAreDocumented(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	a := &Agent{proxy: proxy.New(nil, log), problems: problem.Open(filepath.Join(t.TempDir(), "problems"), log), metrics: newMetrics()}
	defer a.problems.Close()
	a.metrics.registerState(a)
	metrictest.Documented(t, "../..", "agent", a.metrics.registry)
}
