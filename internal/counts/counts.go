// Package counts provides a Prometheus gauge of how many objects are in each state.
package counts

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// within bounds one reading, so that a database that does not answer cannot delay the
// other metrics for longer.
const within = 2 * time.Second

type gauge struct {
	desc   *prometheus.Desc
	states []string
	read   func(context.Context) (map[string]int64, error)
}

// New returns a gauge with the label state. It calls read for each scrape. A state that
// read leaves out is 0. States that are not in states are ignored, because labels must
// come from a fixed set.
func New(name, help string, states []string, read func(context.Context) (map[string]int64, error)) prometheus.Collector {
	return &gauge{prometheus.NewDesc(name, help, []string{"state"}, nil), states, read}
}

func (g *gauge) Describe(ch chan<- *prometheus.Desc) { ch <- g.desc }

func (g *gauge) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	n, err := g.read(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(g.desc, err)
		return
	}
	for _, state := range g.states {
		ch <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, float64(n[state]), state)
	}
}
