package qemu

import (
	"fmt"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
	"github.com/wrenn-dev/wrenn/internal/await"
)

// TestNoKickIsLost makes a guest with one processor respond to many short requests. Each
// is a race: the guest notifies QEMU of a packet unless QEMU polls the queue anyway, and
// QEMU announces that it stops polling. If either does not see what the other wrote, the
// guest sends nothing more. WRENN_TEST_REQUESTS is the number of requests (2000).
func TestNoKickIsLost(t *testing.T) {
	requests := vmmtest.Count(t, "WRENN_TEST_REQUESTS", 2000)
	b := subject.NewBench(t)
	b.Boot("token")
	web := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: await.Scale(60 * time.Second)}
	url := fmt.Sprintf("http://%s/health", net.JoinHostPort(b.Slot.Address.String(), "49983"))
	var wg sync.WaitGroup
	begun := time.Now()
	for range 4 {
		wg.Go(func() {
			for i := range requests / 4 {
				r, err := web.Get(url)
				if err != nil {
					t.Errorf("after %d requests: %v", i, err)
					return
				}
				r.Body.Close()
			}
		})
	}
	wg.Wait()
	t.Logf("%d requests in %v", requests, time.Since(begun).Round(time.Millisecond))
}
