package notify

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-dev/wrenn/internal/counts"
)

// The states of a pending delivery for [Service.Collectors].
const (
	due   = "due"
	later = "later"
)

// Collectors returns the service's Prometheus metrics.
func (s *Service) Collectors() []prometheus.Collector {
	return []prometheus.Collector{counts.New("wrenn_deliveries", "Notifications that were not delivered yet, by state: due ones wait for a server, later ones are being tried or wait for the next attempt.", []string{due, later}, s.count)}
}

func (s *Service) count(ctx context.Context) (map[string]int64, error) {
	row, err := s.Store.CountPendingDeliveries(ctx)
	return map[string]int64{due: row.Due, later: row.Later}, err
}
