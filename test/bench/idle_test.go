package bench

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
)

const (
	idleMemory = 512
	// idleTime is how long guests are left alone before they are measured.
	idleTime = 10 * time.Second
)

// TestIdle measures the memory of many idle sandboxes. WRENN_TEST_IDLE is their number
// (50).
func TestIdle(t *testing.T) {
	asked(t)
	idle := vmmtest.Count(t, "WRENN_TEST_IDLE", 50)
	h := newHost(t, idle*1024, nil)
	if have := meminfo(t, "MemAvailable"); have < 6<<30 {
		t.Skipf("needs 6 GiB of memory, and %s are available", mib(have))
	}
	first := h.create(t, idleMemory)
	h.hello(t, first)
	free := meminfo(t, "MemAvailable")
	begin := time.Now()
	sandboxes := make([]string, idle)
	took := make(sample, idle)
	var wg sync.WaitGroup
	for i := range sandboxes {
		r := request(idleMemory)
		sandboxes[i] = r.SandboxId
		wg.Go(func() {
			if _, err := h.Create(t.Context(), connect.NewRequest(r)); err != nil {
				t.Errorf("create: %v", err)
				return
			}
			h.hello(t, r.SandboxId)
			took[i] = time.Since(begin)
		})
	}
	wg.Wait()
	all := time.Since(begin)
	if t.Failed() {
		t.FailNow()
	}
	time.Sleep(idleTime)
	fell := free - meminfo(t, "MemAvailable")
	var pss, own, base, rest []int64
	for _, s := range sandboxes {
		u := usage(t, agenttest.QEMU(s))
		pss, own, base, rest = append(pss, u.pss), append(own, u.own), append(base, u.base), append(rest, u.pss-u.own-u.base)
	}
	shared := sum(base) * int64(idle+1) / int64(idle) // the first sandbox has its share too
	table(fmt.Sprintf("%d sandboxes of one template of %d MiB at once", idle, idleMemory), []string{"what", "value"}, [][]string{
		{"until all were created and had run their first command", ms(all)},
		{"the same, per sandbox", ms(all / time.Duration(idle))},
		{"the fastest sandbox", ms(min0(took))},
		{"PSS of an idle sandbox's QEMU", mib(middle(pss))},
		{"of that: the guest's own pages, changed since the template", mib(middle(own))},
		{"of that: its share of the template's memory, which all map", mib(middle(base))},
		{"of that: QEMU itself", mib(middle(rest))},
		{"extra memory for one more sandbox: its own pages and QEMU", mib(middle(pss) - middle(base))},
		{"the template's memory that is mapped, once for all", mib(shared)},
		{"the host's available memory fell by, for each sandbox", mib(fell / int64(idle))},
	})
	for _, s := range append(sandboxes, first) {
		wg.Go(func() { h.destroy(t, s) })
	}
	wg.Wait()
}

func min0(s sample) time.Duration {
	least := s[0]
	for _, d := range s {
		least = min(least, d)
	}
	return least
}

func sum(all []int64) (n int64) {
	for _, v := range all {
		n += v
	}
	return n
}

// memoryUse is a machine's memory use, in bytes.
type memoryUse struct {
	pss  int64 // proportional: shared pages count in parts
	own  int64 // of the guest's memory: pages of this guest alone
	base int64 // of the guest's memory: its part of the shared pages
}

// usage reads /proc/PID/smaps (proc(5)).
func usage(t *testing.T, pid int) (u memoryUse) {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	guest := false // the lines describe the guest's memory
	var inMapping, anonymous int64
	s := bufio.NewScanner(f)
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) >= 5 && strings.Contains(f[0], "-") {
			guest = strings.Contains(s.Text(), "/memfd:wrenn-")
			continue
		}
		if len(f) != 3 {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		switch f[0] {
		case "Pss:":
			u.pss += kib << 10
			if guest {
				inMapping += kib << 10
			}
		case "Anonymous:":
			if guest {
				anonymous += kib << 10
			}
		}
	}
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	if inMapping == 0 {
		t.Fatalf("process %d does not map the template's memory", pid)
	}
	u.own, u.base = anonymous, inMapping-anonymous
	return u
}
