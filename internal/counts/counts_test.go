package counts

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestStates(t *testing.T) {
	var failed error
	c := New("things", "Things.", []string{"old", "new"}, func(context.Context) (map[string]int64, error) {
		return map[string]int64{"new": 2, "unheard of": 3}, failed
	})
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(c)
	want := "# HELP things Things.\n# TYPE things gauge\nthings{state=\"new\"} 2\nthings{state=\"old\"} 0\n"
	if err := testutil.GatherAndCompare(r, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
	failed = errors.New("the database does not answer")
	if _, err := r.Gather(); !errors.Is(err, failed) && (err == nil || !strings.Contains(err.Error(), failed.Error())) {
		t.Errorf("a failed reading: %v", err)
	}
}
