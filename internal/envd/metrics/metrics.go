// Package metrics measures the guest's use of CPU, memory and disk.
package metrics

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/envd/fault"
)

// Metrics is one reading. Sizes are bytes unless their name says MiB.
type Metrics struct {
	Timestamp   int64   `json:"ts"` // seconds since 1970
	CPUCount    int     `json:"cpu_count"`
	CPUUsedPct  float64 `json:"cpu_used_pct"` // since the previous reading; 100 means that all CPUs were busy
	MemTotal    uint64  `json:"mem_total"`
	MemUsed     uint64  `json:"mem_used"`
	MemTotalMiB uint64  `json:"mem_total_mib"`
	MemUsedMiB  uint64  `json:"mem_used_mib"`
	DiskUsed    uint64  `json:"disk_used"`
	DiskTotal   uint64  `json:"disk_total"`
}

// minInterval is the least time between two measurements of the CPUs' use. Earlier readings
// return the last result, because the kernel counts in hundredths of a second.
const minInterval = 200 * time.Millisecond

// Reader reads metrics on request. Nothing runs in between.
type Reader struct {
	mu   sync.Mutex
	last ticks
	at   time.Time
	pct  float64
}

// NewReader returns a reader whose first reading has the CPUs' use since now.
func NewReader() *Reader {
	r := &Reader{at: time.Now()}
	r.last, _ = readTicks("/proc/stat")
	return r
}

// Read takes a reading.
func (r *Reader) Read() (Metrics, error) {
	m := Metrics{Timestamp: time.Now().Unix(), CPUCount: runtime.NumCPU()}
	var err error
	if m.CPUUsedPct, err = r.cpu(); err != nil {
		return Metrics{}, err
	}
	var available uint64
	if m.MemTotal, available, err = readMemory("/proc/meminfo"); err != nil {
		return Metrics{}, err
	}
	m.MemUsed = m.MemTotal - min(available, m.MemTotal)
	m.MemTotalMiB, m.MemUsedMiB = m.MemTotal>>20, m.MemUsed>>20
	var st unix.Statfs_t
	if err := unix.Statfs("/", &st); err != nil {
		return Metrics{}, fmt.Errorf("measure disk: %w", err)
	}
	m.DiskTotal = st.Blocks * uint64(st.Bsize)
	m.DiskUsed = (st.Blocks - st.Bfree) * uint64(st.Bsize)
	return m, nil
}

func (r *Reader) cpu() (float64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.at) < minInterval {
		return r.pct, nil
	}
	now, err := readTicks("/proc/stat")
	if err != nil {
		return 0, err
	}
	// A counter can decrease when a guest is restored.
	if now.total > r.last.total && now.idle >= r.last.idle {
		total, idle := float64(now.total-r.last.total), float64(now.idle-r.last.idle)
		r.pct = math.Round(max(0, 1-idle/total)*10000) / 100
	}
	r.last, r.at = now, time.Now()
	return r.pct, nil
}

// ServeHTTP responds with a reading as JSON.
func (r *Reader) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	m, err := r.Read()
	if err != nil {
		fault.WriteError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(m)
}

// ticks are the CPU time of all CPUs since boot.
type ticks struct{ total, idle uint64 }

func readTicks(file string) (ticks, error) {
	f, err := os.Open(file)
	if err != nil {
		return ticks{}, fmt.Errorf("read CPU time: %w", err)
	}
	defer f.Close()
	line, err := bufio.NewReader(f).ReadString('\n')
	if err != nil {
		return ticks{}, fmt.Errorf("read CPU time: %w", err)
	}
	return parseTicks(line)
}

// parseTicks reads the first line of /proc/stat: user, nice, system, idle,
// iowait, irq, softirq, steal; what follows is counted in user already.
func parseTicks(line string) (ticks, error) {
	f := strings.Fields(line)
	if len(f) < 5 || f[0] != "cpu" {
		return ticks{}, fmt.Errorf("read CPU time: unexpected line %q", line)
	}
	var t ticks
	for i, s := range f[1:min(len(f), 9)] {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return ticks{}, fmt.Errorf("read CPU time: %w", err)
		}
		t.total += n
		if i == 3 || i == 4 {
			t.idle += n
		}
	}
	return t, nil
}

func readMemory(file string) (total, available uint64, err error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, 0, fmt.Errorf("read memory: %w", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 2 {
			continue
		}
		var to *uint64
		switch fields[0] {
		case "MemTotal:":
			to = &total
		case "MemAvailable:":
			to = &available
		default:
			continue
		}
		n, err := strconv.ParseUint(fields[1], 10, 54)
		if err != nil {
			return 0, 0, fmt.Errorf("read memory: %w", err)
		}
		*to = n << 10
	}
	if total == 0 {
		return 0, 0, fmt.Errorf("read memory: %s names no total", file)
	}
	return total, available, nil
}
