package hosts

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-dev/wrenn/internal/counts"
	"github.com/wrenn-dev/wrenn/internal/gen/db"
)

// Collectors returns the registry's Prometheus metrics.
func (r *Registry) Collectors() []prometheus.Collector {
	return []prometheus.Collector{counts.New("wrenn_hosts", "Hosts by state.", []string{"pending", "online", "draining", "unreachable", "offline"}, r.count)}
}

func (r *Registry) count(ctx context.Context) (map[string]int64, error) {
	rows, err := r.Store.CountHosts(ctx)
	n := make(map[string]int64, len(rows))
	for _, row := range rows {
		n[Status(db.Host{Status: row.Status, Draining: row.Draining})] += row.N
	}
	return n, err
}
