package builds

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-dev/wrenn/internal/counts"
)

// Collectors returns the service's Prometheus metrics.
func (s *Service) Collectors() []prometheus.Collector {
	return []prometheus.Collector{counts.New("wrenn_builds", "Builds that have not ended, by state.", []string{string(Queued), string(Running)}, s.count)}
}

func (s *Service) count(ctx context.Context) (map[string]int64, error) {
	rows, err := s.Store.CountOpenBuilds(ctx)
	n := make(map[string]int64, len(rows))
	for _, row := range rows {
		n[row.State] = row.N
	}
	return n, err
}
