package sandboxes

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-dev/wrenn/internal/counts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/tracing"
)

type metrics struct {
	creations *prometheus.CounterVec
	latency   prometheus.Histogram
	waiting   prometheus.Gauge
	steps     *prometheus.HistogramVec
	states    prometheus.Collector
}

func newMetrics(s *store.Store) metrics {
	return metrics{
		creations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wrenn_sandbox_creations_total", Help: "Sandboxes asked for, by how that went: ok, or the error's code.",
		}, []string{"result"}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "wrenn_sandbox_create_seconds", Help: "Time from asking a host for a sandbox until it was ready.",
			Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120},
		}),
		waiting: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "wrenn_sandbox_waiting_calls", Help: "Calls that wait for what an earlier call does to their sandbox.",
		}),
		steps: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_sandbox_step_seconds", Help: "Time of each step of a creation, pause or resume, the host's part being one, by how it went: ok or error.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120},
		}, []string{"operation", "step", "result"}),
		states: counts.New("wrenn_sandboxes", "Sandboxes that have not ended, by state.", liveStates(), countStates(s)),
	}
}

func (m metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.creations, m.latency, m.waiting, m.steps, m.states}
}

// wait counts a call that waits, until done is called.
func (m metrics) wait() (done func()) {
	m.waiting.Inc()
	return m.waiting.Dec
}

func (m metrics) created(result string, took time.Duration) {
	m.creations.WithLabelValues(result).Inc()
	if result == "ok" {
		m.latency.Observe(took.Seconds())
	}
}

// Steps of an operation.
const (
	stepPlace   = "place"   // find hosts that have room
	stepReserve = "reserve" // write the row, and the room that it takes
	stepMark    = "mark"    // write that the sandbox is in transit
	stepHost    = "host"    // the host's part
	stepWrite   = "write"   // write how it went
)

// step does a step of an operation and takes note of how long it took.
func (s *Service) step(ctx context.Context, operation, name string, f func(context.Context) error) error {
	begun := time.Now()
	ctx, span := tracing.Step(ctx, operation, name)
	err := f(ctx)
	span.EndWith(err)
	result := "ok"
	if err != nil {
		result = "error"
	}
	s.metrics.steps.WithLabelValues(operation, name, result).Observe(time.Since(begun).Seconds())
	return err
}

// liveStates returns the states of sandboxes that have not ended.
func liveStates() (states []string) {
	for _, state := range States() {
		if !state.Ended() {
			states = append(states, string(state))
		}
	}
	return states
}

// countStates counts sandboxes in the database.
func countStates(s *store.Store) func(context.Context) (map[string]int64, error) {
	return func(ctx context.Context) (map[string]int64, error) {
		rows, err := s.CountLiveSandboxes(ctx)
		n := make(map[string]int64, len(rows))
		for _, r := range rows {
			n[r.State] = r.N
		}
		return n, err
	}
}
