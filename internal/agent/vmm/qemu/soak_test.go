package qemu

import (
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
)

// TestPausesUnderLoad pauses a guest again and again while its disk and its
// network card interrupt it, and wants each restored guest to answer, and to
// write to its disk. WRENN_TEST_PAUSES is how often (3).
func TestPausesUnderLoad(t *testing.T) {
	pauses := vmmtest.Count(t, "WRENN_TEST_PAUSES", 3)
	b := newBench(t)
	b.run(nil, "", "token 0")
	b.sh(`sync`)
	base, devices := b.save(nil)
	b.kill()
	ram, err := base.Materialize(t.Context(), "saved")
	b.must(err)
	defer ram.Close()
	b.spec.Kernel, b.spec.Initrd, b.spec.Cmdline = "", "", ""

	// Packets to a closed port, each of which the guest answers.
	conn, err := net.Dial("udp", net.JoinHostPort(b.slot.Address.String(), "9"))
	b.must(err)
	defer conn.Close()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_, _ = conn.Write(make([]byte, 400)) // refused, and lost where no guest runs
			case <-stop:
				return
			}
		}
	}()
	defer func() { close(stop); <-stopped }()

	image := base
	for i := range pauses {
		b.run(&vmm.Saved{Memory: ram, Changed: image.ChangedFrom(base), Devices: devices}, "token "+strconv.Itoa(i), "token "+strconv.Itoa(i+1))
		b.sh(`pkill dd; n=$(cat /root/n 2>/dev/null || echo 0); echo $((n+1)) >/root/n; sync /root/n
setsid sh -c 'while :; do dd if=/dev/zero of=/root/load bs=64k count=8 conv=notrunc oflag=direct; done' >/dev/null 2>&1 &`)
		image, devices = b.save(image) // checks the state of the interrupt controllers
		b.kill()
	}
	b.run(&vmm.Saved{Memory: ram, Changed: image.ChangedFrom(base), Devices: devices}, "token "+strconv.Itoa(pauses), "end")
	if n := b.number("cat /root/n"); n != pauses {
		t.Errorf("the guest wrote %d times, want %d", n, pauses)
	}
}
