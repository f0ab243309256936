package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
)

// metrics are what Prometheus reads at /metrics.
type metrics struct {
	registry *prometheus.Registry
	steps    *prometheus.HistogramVec
	failures *prometheus.CounterVec
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		steps: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_agent_step_seconds", Help: "Time that each step of sandboxes' lives took.",
			Buckets: []float64{.001, .005, .02, .1, .5, 1, 2, 5, 10, 30, 60, 120},
		}, []string{"step"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wrenn_agent_step_failures_total", Help: "Steps of sandboxes' lives that failed.",
		}, []string{"step"}),
	}
	m.registry.MustRegister(m.steps, m.failures, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// observe takes note of one step.
func (m *metrics) observe(step string, took time.Duration, err error) {
	m.steps.WithLabelValues(step).Observe(took.Seconds())
	if err != nil {
		m.failures.WithLabelValues(step).Inc()
	}
}

// watch adds what is read from the agent when it is asked for.
func (m *metrics) watch(a *Agent) {
	gauge := func(name, help string, f func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	m.registry.MustRegister(a.proxy.Collectors()...)
	m.registry.MustRegister(a.problems)
	m.registry.MustRegister(&states{a.sandboxes, prometheus.NewDesc("wrenn_agent_sandboxes", "Sandboxes by state.", []string{"state"}, nil)})
	gauge("wrenn_agent_memory_reserved_bytes", "Memory promised to sandboxes, and taken by what they began with.", func() float64 {
		reserved, _ := a.sandboxes.Memory()
		return float64(reserved) * (1 << 20)
	})
	gauge("wrenn_agent_memory_limit_bytes", "Memory that sandboxes may have together.", func() float64 {
		_, total := a.sandboxes.Memory()
		return float64(total) * (1 << 20)
	})
	gauge("wrenn_agent_events_pending", "Events that the control plane has not acknowledged.", func() float64 {
		return float64(len(a.journal.Pending()))
	})
}

// states collects how many sandboxes are in which state.
type states struct {
	sandboxes *sandbox.Manager
	desc      *prometheus.Desc
}

func (s *states) Describe(ch chan<- *prometheus.Desc) { ch <- s.desc }

func (s *states) Collect(ch chan<- prometheus.Metric) {
	n := map[sandbox.State]int{}
	for _, state := range sandbox.States() {
		n[state] = 0
	}
	for _, i := range s.sandboxes.List() {
		n[i.State]++
	}
	for state, count := range n {
		ch <- prometheus.MustNewConstMetric(s.desc, prometheus.GaugeValue, float64(count), string(state))
	}
}
