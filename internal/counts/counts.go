// Package counts has a Prometheus gauge of how many things are in which state.
package counts

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// within bounds one reading, so that a database that does not answer delays the other
// metrics no longer.
const within = 2 * time.Second

type gauge struct {
	desc   *prometheus.Desc
	states []string
	read   func(context.Context) (map[string]int64, error)
}

// New returns a gauge with the label state that calls read whenever Prometheus asks. A
// state that read leaves out is 0, and one that is not in states is left out: labels
// must not be anybody's to choose.
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
