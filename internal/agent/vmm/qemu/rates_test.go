package qemu

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
)

// TestDiskRates writes more than the rates allow: at first, after the disk was
// diverted, and after a restore. Each time the writes take as long as the rates say.
func TestDiskRates(t *testing.T) {
	b := newBench(t)
	b.spec.Rates = rates.Rates{DiskBytes: 8 << 20, DiskOps: 100, Burst: time.Second}
	b.run(nil, "", "first")
	slow := func(when string) {
		t.Helper()
		for _, w := range []struct {
			name, script string
			least        time.Duration // for all but what the burst has
		}{
			// 24 MiB, of which 8 at once.
			{"24 MiB", "dd if=/dev/zero of=/root/blob bs=256k count=96 oflag=direct conv=notrunc 2>&1", 2 * time.Second},
			// 300 operations, of which 100 at once.
			{"300 operations", "dd if=/dev/zero of=/root/blob bs=4k count=300 oflag=direct conv=notrunc 2>&1", 2 * time.Second},
		} {
			begin := time.Now()
			said := b.sh(w.script)
			// A tenth for the clocks.
			if took := time.Since(begin); took < w.least*9/10 {
				t.Errorf("%s: %s took %v, less than %v: %s", when, w.name, took, w.least, said)
			}
		}
	}
	slow("at first")

	next := filepath.Join(b.spec.Dir, "diverted")
	b.must(disk.Create(disk.Qcow2, next, b.spec.DiskBytes, b.spec.UID))
	b.must(b.vm.Hold(t.Context()))
	b.must(b.vm.Divert(t.Context(), next))
	b.must(b.vm.Run(t.Context()))
	slow("after the disk was diverted")
	b.spec.Layers, b.spec.Overlay = []string{b.spec.Overlay}, next

	image, devices := b.save(nil)
	b.kill()
	ram, err := image.Materialize(t.Context(), "saved")
	b.must(err)
	defer ram.Close()
	b.fresh(b.spec.Overlay)
	b.run(&vmm.Saved{Memory: ram, Devices: devices}, "first", "second")
	slow("after a restore")

	// It is held at once, though its guest waits for the disk.
	b.sh("setsid dd if=/dev/zero of=/root/blob bs=256k count=2000 oflag=direct conv=notrunc >/dev/null 2>&1 &")
	time.Sleep(100 * time.Millisecond) // whether it has begun to wait changes nothing that must hold
	begin := time.Now()
	b.must(b.vm.Hold(t.Context()))
	if took, most := time.Since(begin), vmmtest.Within(t, 20*time.Second); took > most {
		t.Errorf("holding a machine whose guest waits for its disk took %v", took)
	}
}
