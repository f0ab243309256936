package metrics

import (
	"testing"
	"time"
)

func TestRead(t *testing.T) {
	r := NewReader()
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
	}
	m, err := r.Read()
	if err != nil {
		t.Fatal(err)
	}
	if m.CPUCount < 1 || m.CPUUsedPct <= 0 || m.CPUUsedPct > 100 || m.MemTotal == 0 || m.MemUsed == 0 || m.MemUsed > m.MemTotal ||
		m.MemTotalMiB != m.MemTotal>>20 || m.DiskTotal == 0 || m.DiskUsed > m.DiskTotal || time.Since(time.Unix(m.Timestamp, 0)) > time.Minute {
		t.Errorf("reading is %+v", m)
	}
	again, err := r.Read()
	if err != nil || again.CPUUsedPct != m.CPUUsedPct {
		t.Errorf("a second reading right after the first is %+v, %v", again, err)
	}
}

func TestParseTicks(t *testing.T) {
	got, err := parseTicks("cpu  10 1 20 100 5 0 2 3 7 7\n")
	if err != nil || got != (ticks{total: 141, idle: 105}) {
		t.Errorf("ticks are %+v, %v", got, err)
	}
	for _, bad := range []string{"", "cpu0 1 2 3 4", "cpu a b c d", "cpu 1"} {
		if _, err := parseTicks(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}
