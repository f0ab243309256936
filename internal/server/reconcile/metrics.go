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
			Name: "wrenn_reconcile_actions_total", Help: "Actions that brought the database and a host into agreement, by how they went: ok, error, timeout or panic.",
		}, []string{"action", "result"}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_reconcile_action_seconds", Help: "Time that an action took.", Buckets: buckets,
		}, []string{"action"}),
		looks: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_reconcile_compare_seconds", Help: "Time to read the database and a host's lists and to decide what to do, by how that went: ok or error.", Buckets: buckets,
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
	depthDesc  = prometheus.NewDesc("wrenn_reconcile_queue_depth", "Sandboxes and templates of a host that wait to be reconciled, or are worked on.", []string{"host"}, nil)
	lagDesc    = prometheus.NewDesc("wrenn_reconcile_lag_seconds", "Time since the last comparison of the database with a host that succeeded began, or, if there is none, since this server began to watch the host.", []string{"host"}, nil)
	oldestDesc = prometheus.NewDesc("wrenn_reconcile_queue_oldest_seconds", "For how long the oldest sandbox or template in the queue has waited; 0: there is none.", []string{"host"}, nil)
)

// queues reads what there is of each host that this server watches.
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
