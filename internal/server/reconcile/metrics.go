package reconcile

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-dev/wrenn/internal/id"
)

type metrics struct {
	actions *prometheus.CounterVec
	took    *prometheus.HistogramVec
	looks   *prometheus.HistogramVec
}

func newMetrics() *metrics {
	buckets := []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30, 60, 300, 600}
	return &metrics{
		actions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "wrenn_reconcile_actions_total", Help: "Actions that reconciled the database with a host, by result: ok, error, timeout or panic.",
		}, []string{"action", "result"}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_reconcile_action_seconds", Help: "Duration of an action.", Buckets: buckets,
		}, []string{"action"}),
		looks: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_reconcile_compare_seconds", Help: "Duration of a comparison of the database with a host's lists, by result: ok or error.", Buckets: buckets,
		}, []string{"result"}),
	}
}

func (m *metrics) acted(k Kind, err error, took time.Duration) {
	m.actions.WithLabelValues(string(k), result(err)).Inc()
	m.took.WithLabelValues(string(k)).Observe(took.Seconds())
}

func (m *metrics) compared(err error, took time.Duration) {
	how := "ok"
	if err != nil {
		how = "error"
	}
	m.looks.WithLabelValues(how).Observe(took.Seconds())
}

// Collectors returns the controller's Prometheus metrics.
func (c *Controller) Collectors() []prometheus.Collector {
	return []prometheus.Collector{c.metrics.actions, c.metrics.took, c.metrics.looks, queues{c}}
}

var (
	depthDesc  = prometheus.NewDesc("wrenn_reconcile_queue_depth", "Sandboxes and templates of a host with a queued or running action.", []string{"host"}, nil)
	lagDesc    = prometheus.NewDesc("wrenn_reconcile_lag_seconds", "Time since the start of the last successful comparison of the database with a host, or, if there was none, since this server began to watch the host.", []string{"host"}, nil)
	oldestDesc = prometheus.NewDesc("wrenn_reconcile_queue_oldest_seconds", "Age of the oldest action in the queue; 0 if the queue is empty.", []string{"host"}, nil)
)

// queues collects the metrics of each watched host's queue.
type queues struct{ *Controller }

func (q queues) Describe(ch chan<- *prometheus.Desc) {
	ch <- depthDesc
	ch <- oldestDesc
	ch <- lagDesc
}

func (q queues) Collect(ch chan<- prometheus.Metric) {
	q.mu.Lock()
	watched := make(map[string]*watch, len(q.watched))
	for host, w := range q.watched {
		watched[id.Format(id.Host, host)] = w
	}
	q.mu.Unlock()
	for host, w := range watched {
		n, since := w.queue.depth()
		age := 0.0
		if n > 0 {
			age = time.Since(since).Seconds()
		}
		ch <- prometheus.MustNewConstMetric(depthDesc, prometheus.GaugeValue, float64(n), host)
		ch <- prometheus.MustNewConstMetric(oldestDesc, prometheus.GaugeValue, age, host)
		ch <- prometheus.MustNewConstMetric(lagDesc, prometheus.GaugeValue, time.Since(*w.agreed.Load()).Seconds(), host)
	}
}
