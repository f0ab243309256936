package sandboxes

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-dev/wrenn/internal/server/store"
)

type metrics struct {
	creations *prometheus.CounterVec
	latency   prometheus.Histogram
	waiting   prometheus.Gauge
	states    *states
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
		states: &states{store: s, desc: prometheus.NewDesc("wrenn_sandboxes", "Sandboxes that have not ended, by state.", []string{"state"}, nil)},
	}
}

func (m metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.creations, m.latency, m.waiting, m.states}
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

// states counts sandboxes in the database whenever it is asked.
type states struct {
	store *store.Store
	desc  *prometheus.Desc
}

func (c *states) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

func (c *states) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	rows, err := c.store.CountLiveSandboxes(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.desc, err)
		return
	}
	count := make(map[State]int64)
	for _, state := range States() {
		if !state.Ended() {
			count[state] = 0
		}
	}
	for _, r := range rows {
		count[State(r.State)] = r.N
	}
	for state, n := range count {
		ch <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(n), string(state))
	}
}
