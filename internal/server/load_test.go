package server_test

import (
	"fmt"
	"io"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkLoad is the control plane alone under load: 200 clients list, get
// and ask for sandboxes' ports by turns, a fixed number of times. It prints
// requests a second, the time that 99 of 100 stay below, and the heap at ten
// points, which must not grow. Clients and the stand-in host are in the same
// process and take their share of it.
//
//	go test -run '^$' -bench Load -benchtime 1x ./internal/server
func BenchmarkLoad(b *testing.B) {
	const clients, requests, boxes, points = 200, 20000, 50, 10
	var p *plane
	ids := make([]string, boxes)
	b.Run("clients=200", func(b *testing.B) {
		p = newPlane(b)
		p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") })
		for i := range ids {
			ids[i] = p.create(map[string]any{"memory_mib": 128})
		}
		client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: clients, MaxConnsPerHost: clients}}
		one := func(n int) error {
			id := ids[n%boxes]
			path, host := "/v1/sandboxes/"+id, ""
			switch n % 3 {
			case 1:
				path = "/v1/sandboxes?limit=20"
			case 2:
				path, host = "/", "80-"+id+".localhost"
			}
			req, err := http.NewRequest(http.MethodGet, p.http.URL+path, nil)
			if err != nil {
				return err
			}
			req.Host = host
			req.Header.Set("X-API-Key", adminKey)
			resp, err := client.Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			_, err = io.Copy(io.Discard, resp.Body)
			if resp.StatusCode != http.StatusOK {
				return fmt.Errorf("%s: %s", path, resp.Status)
			}
			return err
		}
		for b.Loop() {
			var next atomic.Int64
			var mu sync.Mutex
			var heap []uint64
			took := make([]time.Duration, requests)
			var wg sync.WaitGroup
			began := time.Now()
			for range clients {
				wg.Go(func() {
					for {
						n := int(next.Add(1)) - 1
						if n >= requests {
							return
						}
						at := time.Now()
						if err := one(n); err != nil {
							b.Error(err)
							return
						}
						took[n] = time.Since(at)
						if n%(requests/points) == requests/points-1 {
							var m runtime.MemStats
							runtime.GC()
							runtime.ReadMemStats(&m)
							mu.Lock()
							heap = append(heap, m.HeapAlloc)
							mu.Unlock()
						}
					}
				})
			}
			wg.Wait()
			whole := time.Since(began)
			slices.Sort(took)
			b.ReportMetric(float64(requests)/whole.Seconds(), "requests/s")
			b.ReportMetric(float64(took[requests*99/100])/1e6, "p99-ms")
			b.ReportMetric(float64(took[requests/2])/1e6, "p50-ms")
			line := "heap after each tenth, MiB:"
			for _, h := range heap {
				line += fmt.Sprintf(" %.1f", float64(h)/(1<<20))
			}
			b.Log(line)
		}
	})
}
