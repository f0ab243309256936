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

// TestNoKickIsLost has a guest with one processor answer many short requests:
// each is a race between the guest, which tells QEMU of a packet unless QEMU
// looks at the queue anyway, and QEMU, which says that it no longer looks. If
// either does not see what the other wrote, the guest sends nothing more.
// WRENN_TEST_REQUESTS is how many requests (2000).
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
