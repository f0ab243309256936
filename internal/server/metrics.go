package server

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/server/rest"
)

// observers has the metrics of all HTTP requests and of the server's parts.
type observers struct {
	registry  *prometheus.Registry
	requests  *prometheus.CounterVec
	durations *prometheus.HistogramVec
}

// part is a component with metrics.
type part interface{ Collectors() []prometheus.Collector }

func newObservers(memory *budget.Budget, parts ...part) *observers {
	o := &observers{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "wrenn_http_requests_total", Help: "Completed requests of the REST API."}, []string{"method", "route", "status"}),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "wrenn_http_request_seconds", Help: "Duration of requests, except those whose duration the client or the sandbox determines.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}, []string{"method", "route"}),
	}
	o.registry.MustRegister(
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), o.requests, o.durations,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "wrenn_request_memory_bytes", Help: "Memory that is accounted to requests in flight.",
		}, func() float64 { return float64(memory.Used()) }),
	)
	for _, p := range parts {
		o.registry.MustRegister(p.Collectors()...)
	}
	return o
}

// observe counts a completed request.
func (o *observers) observe(seen rest.Observation) {
	o.requests.WithLabelValues(seen.Method, seen.Route, strconv.Itoa(seen.Status)).Inc()
	if !seen.Lasts {
		o.durations.WithLabelValues(seen.Method, seen.Route).Observe(seen.Took.Seconds())
	}
}

// parts returns the components that have metrics.
func (s *Server) parts() []part {
	return []part{s.store, s.hosts, s.sandboxes, s.builds, s.channels, s.reconcile}
}
