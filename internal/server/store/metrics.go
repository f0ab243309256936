package store

import (
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
)

var (
	connectionsDesc = prometheus.NewDesc("wrenn_database_connections", "Connections to the database by pool and state: used, idle or opening. The pool vital is only for heartbeats and leases.", []string{"pool", "state"}, nil)
	limitDesc       = prometheus.NewDesc("wrenn_database_connections_limit", "Maximum number of connections of a pool.", []string{"pool"}, nil)
	waitsDesc       = prometheus.NewDesc("wrenn_database_waits_total", "Queries that had to wait for a connection.", []string{"pool"}, nil)
	waitedDesc      = prometheus.NewDesc("wrenn_database_wait_seconds_total", "Time that queries waited for a connection.", []string{"pool"}, nil)
)

// Collectors returns the store's Prometheus metrics.
func (s *Store) Collectors() []prometheus.Collector { return []prometheus.Collector{pools{s}} }

// pools collects the counters of the connection pools.
type pools struct{ *Store }

func (p pools) Describe(ch chan<- *prometheus.Desc) {
	ch <- connectionsDesc
	ch <- limitDesc
	ch <- waitsDesc
	ch <- waitedDesc
}

func (p pools) Collect(ch chan<- prometheus.Metric) {
	for name, pool := range map[string]*pgxpool.Pool{"main": p.pool, "vital": p.kept} {
		s := pool.Stat()
		for state, n := range map[string]int32{"used": s.AcquiredConns(), "idle": s.IdleConns(), "opening": s.ConstructingConns()} {
			ch <- prometheus.MustNewConstMetric(connectionsDesc, prometheus.GaugeValue, float64(n), name, state)
		}
		ch <- prometheus.MustNewConstMetric(limitDesc, prometheus.GaugeValue, float64(s.MaxConns()), name)
		ch <- prometheus.MustNewConstMetric(waitsDesc, prometheus.CounterValue, float64(s.EmptyAcquireCount()), name)
		ch <- prometheus.MustNewConstMetric(waitedDesc, prometheus.CounterValue, s.EmptyAcquireWaitTime().Seconds(), name)
	}
}
