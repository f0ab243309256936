package agent

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/wrenn-dev/wrenn/internal/agent/network"
	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	"github.com/wrenn-dev/wrenn/internal/counts"
)

// metrics has the agent's Prometheus metrics.
type metrics struct {
	registry          *prometheus.Registry
	operations, steps timed
}

// timed measures how long something takes and how often it fails.
type timed struct {
	took     *prometheus.HistogramVec
	failures *prometheus.CounterVec
}

func newTimed(name, what string, labels ...string) timed {
	return timed{
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_agent_" + name + "_seconds", Help: "Time that " + what + " took, failed ones included.",
			Buckets: []float64{.001, .005, .02, .1, .5, 1, 2, 5, 10, 30, 60, 120},
		}, labels),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wrenn_agent_" + name + "_failures_total", Help: "How often " + what + " failed.",
		}, labels),
	}
}

func (t timed) observe(took time.Duration, err error, labels ...string) {
	t.took.WithLabelValues(labels...).Observe(took.Seconds())
	if err != nil {
		t.failures.WithLabelValues(labels...).Inc()
	}
}

func newMetrics() *metrics {
	m := &metrics{
		registry:   prometheus.NewRegistry(),
		operations: newTimed("operation", "an operation on a sandbox or template", "operation"),
		steps:      newTimed("step", "a step of an operation", "operation", "step"),
	}
	for _, t := range []timed{m.operations, m.steps} {
		m.registry.MustRegister(t.took, t.failures)
	}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// observe records the duration of one step of an operation, or of the whole operation
// if step is "".
func (m *metrics) observe(operation, step string, took time.Duration, err error) {
	if step == "" {
		m.operations.observe(took, err, operation)
		return
	}
	m.steps.observe(took, err, operation, step)
}

// registerState registers the metrics that are computed from the agent's state on each scrape.
func (m *metrics) registerState(a *Agent) {
	gauge := func(name, help string, f func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	m.registry.MustRegister(a.proxy.Collectors()...)
	m.registry.MustRegister(a.problems)
	var states []string
	for _, s := range sandbox.States() {
		states = append(states, string(s))
	}
	m.registry.MustRegister(
		counts.New("wrenn_agent_sandboxes", "Sandboxes by state.", states, a.countSandboxes),
		counts.New("wrenn_agent_slots", "Network slots by state: free ones do not exist yet, ready ones are prepared, used ones have a guest, and stuck ones could not be removed.", network.SlotStates(), a.countSlots),
	)
	gauge("wrenn_agent_warm_machines", "Restored machines that wait for the next sandboxes.", func() float64 {
		return float64(a.sandboxes.Waiting())
	})
	gauge("wrenn_agent_memory_reserved_bytes", "Memory reserved for sandboxes, including the memory of templates that they share.", func() float64 {
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

func (a *Agent) countSandboxes(context.Context) (map[string]int64, error) {
	n := map[string]int64{}
	for _, i := range a.sandboxes.List() {
		n[string(i.State)]++
	}
	return n, nil
}

func (a *Agent) countSlots(context.Context) (map[string]int64, error) {
	return a.pool.Count(), nil
}
