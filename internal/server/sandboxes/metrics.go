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
			Name: "wrenn_sandbox_creations_total", Help: "Creations of sandboxes, by result: ok, or the error's code.",
		}, []string{"result"}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "wrenn_sandbox_create_seconds", Help: "Duration of the call that makes a host create a sandbox.",
			Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120},
		}),
		waiting: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "wrenn_sandbox_waiting_calls", Help: "Calls that wait for an earlier call on their sandbox.",
		}),
		steps: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_sandbox_step_seconds", Help: "Duration of each step of a creation, pause or resume, including the call to the host, by result: ok or error.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120},
		}, []string{"operation", "step", "result"}),
		states: counts.New("wrenn_sandboxes", "Sandboxes that have not ended, by state.", liveStates(), countStates(s)),
	}
}

func (m metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.creations, m.latency, m.waiting, m.steps, m.states}
}

// wait counts a waiting call until the caller calls done.
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
	stepPlace   = "place"   // find hosts with room
	stepReserve = "reserve" // insert the row, which reserves the room
	stepMark    = "mark"    // mark the sandbox in transit
	stepHost    = "host"    // call the host
	stepWrite   = "write"   // store the result
)

// step runs a step of an operation and records its duration and result.
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
