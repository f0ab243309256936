package qemu

import (
	"net"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
)

// TestPausesUnderLoad pauses a guest while its disk and its network card interrupt
// it. WRENN_TEST_PAUSES is how often (3).
func TestPausesUnderLoad(t *testing.T) {
	b := newBench(t)
	b.pausesUnderLoad(vmmtest.Count(t, "WRENN_TEST_PAUSES", 3))
}

// TestOlderMachinesAreRepaired does the same with machines of the model that
// loses interrupts, which earlier releases saved.
func TestOlderMachinesAreRepaired(t *testing.T) {
	if vmmtest.Accelerator() != KVM {
		t.Skip("needs KVM, under which that model loses interrupts: make test-kvm")
	}
	all := models[KVM]
	i := slices.IndexFunc(all, func(m model) bool { return m.repaired })
	models[KVM] = all[i : i+1]
	defer func() { models[KVM] = all }()
	b := newBench(t)
	b.loses = true
	pauses := vmmtest.Count(t, "WRENN_TEST_PAUSES", 3)
	b.pausesUnderLoad(pauses)
	t.Logf("%d pauses lost the ends of %d interrupts", pauses, b.lost)
}

// load is what keeps a guest's disk and network card busy.
const load = `setsid sh -c 'while :; do dd if=/dev/zero of=/root/load bs=4k count=16384 conv=notrunc oflag=direct; done' >/dev/null 2>&1 &
setsid python3 -c '
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 9))
while True:
    s.sendto(*s.recvfrom(2048))' >/dev/null 2>&1 &`

// pausesUnderLoad pauses a guest again and again. It wants each restored guest to
// answer, and to write to its disk.
func (b *bench) pausesUnderLoad(pauses int) {
	b.Helper()
	b.run(nil, "", "token 0")
	b.sh(`sync`)
	base, devices := b.save(nil)
	b.kill()
	ram, err := base.Materialize(b.Context(), "saved")
	b.must(err)
	defer ram.Close()
	b.spec.Kernel, b.spec.Initrd, b.spec.Cmdline = "", "", ""

	// Each packet comes back, as long as a guest runs.
	conn, err := net.Dial("udp", net.JoinHostPort(b.slot.Address.String(), "9"))
	b.must(err)
	defer conn.Close()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_, _ = conn.Write(make([]byte, 400)) // refused before the guest listens
			case <-stop:
				return
			}
		}
	}()
	defer func() { close(stop); <-stopped }()

	image := base
	for i := range pauses {
		b.run(&vmm.Saved{Memory: ram, Changed: image.ChangedFrom(base), Devices: devices}, "token "+strconv.Itoa(i), "token "+strconv.Itoa(i+1))
		if i == 0 {
			b.sh(load)
		}
		b.sh(`n=$(cat /root/n 2>/dev/null || echo 0); echo $((n+1)) >/root/n; sync /root/n`)
		former := image
		image, devices = b.save(image) // checks the state of the interrupt controllers
		b.kill()
		if former != base {
			b.must(former.Close()) // else there are soon too many open files
		}
	}
	b.run(&vmm.Saved{Memory: ram, Changed: image.ChangedFrom(base), Devices: devices}, "token "+strconv.Itoa(pauses), "end")
	if n := b.number("cat /root/n"); n != pauses {
		b.Errorf("the guest wrote %d times, want %d", n, pauses)
	}
}
