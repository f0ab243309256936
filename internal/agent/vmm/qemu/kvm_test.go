package qemu

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
)

// TestGuestUnderKVM looks at what emulation has otherwise: the guest's clocks and
// its processors, before it is saved and after it is restored.
func TestGuestUnderKVM(t *testing.T) {
	if vmmtest.Accelerator() != KVM {
		t.Skip("needs KVM: make test-kvm")
	}
	b := newBench(t)
	b.spec.VCPUs = 2
	b.spec.Cmdline = guest.Cmdline("kvm-test")
	b.run(nil, "", "first")
	b.sh(teller)
	b.checkClocks()
	b.checkProcessors()
	b.sh("sync")
	before := b.monotonic()
	b.must(b.vm.Hold(t.Context()))
	held := time.Since(before.asked)
	image, devices := b.save(nil) // looks for the local APIC of each processor
	b.kill()
	ram, err := image.Materialize(t.Context(), "saved")
	b.must(err)
	defer ram.Close()

	time.Sleep(5 * time.Second) // which do not pass in the guest
	b.spec.Kernel, b.spec.Initrd, b.spec.Cmdline = "", "", ""
	b.spec.ID = uuid.New()
	begun := time.Now()
	b.run(&vmm.Saved{Memory: ram, Devices: devices}, "first", "second")
	after := b.monotonic()
	if most := before.shown + held + after.told.Sub(begun); after.shown < before.shown || after.shown > most {
		t.Errorf("its monotonic clock showed %v, and after it was restored %v, want %v at most", before.shown, after.shown, most)
	}
	b.checkClocks()
	b.checkProcessors()
}

// teller answers each packet with what it says and what the monotonic clock shows.
const teller = `setsid python3 -c '
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 9))
while True:
    what, whom = s.recvfrom(2048)
    s.sendto(b"%s %d" % (what, time.monotonic_ns()), whom)' >/dev/null 2>&1 &`

// reading is what the guest's monotonic clock showed at some time between two
// times of this process.
type reading struct {
	shown       time.Duration
	asked, told time.Time
}

// monotonic asks the teller.
func (b *bench) monotonic() reading {
	b.Helper()
	conn, err := net.Dial("udp", net.JoinHostPort(b.slot.Address.String(), "9"))
	b.must(err)
	defer conn.Close()
	buf := make([]byte, 100)
	for end := time.Now().Add(vmmtest.Within(b, 60*time.Second)); time.Now().Before(end); {
		asked := time.Now()
		what := strconv.FormatInt(asked.UnixNano(), 10)
		_, err := conn.Write([]byte(what)) // refused before the teller listens
		b.must(conn.SetReadDeadline(asked.Add(time.Second)))
		n := 0
		if err == nil {
			n, err = conn.Read(buf)
		}
		told := time.Now()
		if errors.Is(err, syscall.ECONNREFUSED) {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		// What comes late answers another question.
		answer, found := strings.CutPrefix(string(buf[:n]), what+" ")
		if err != nil || !found {
			continue
		}
		ns, err := strconv.ParseInt(answer, 10, 64)
		b.must(err)
		return reading{time.Duration(ns), asked, told}
	}
	b.Fatal("the guest does not tell its time")
	panic("unreachable")
}

// checkClocks checks where the guest has the time from, and that its seconds are
// as long as the host's: they are not if it is wrong about the rate of its TSC.
func (b *bench) checkClocks() {
	b.Helper()
	if got := b.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"); got != "kvm-clock" {
		b.Errorf("its clock source is %q", got)
	}
	if got := b.sh("cat /sys/class/ptp/ptp0/clock_name; grep -c '^refclock PHC /dev/ptp0 ' /run/chrony.conf; pgrep -c chronyd"); got != "KVM virtual PTP\n1\n1" {
		b.Errorf("its PTP clock, and what chronyd has of it: %q", got)
	}
	// chronyd has no other source that it could put the clock right by.
	b.sh("date -s '+2 hours'")
	for end := time.Now().Add(vmmtest.Within(b, 60*time.Second)); ; {
		before := time.Now()
		s, err := strconv.ParseFloat(b.sh("date +%s.%N"), 64)
		b.must(err)
		told := time.UnixMicro(int64(s * 1e6))
		if told.After(before.Add(-time.Second)) && told.Before(time.Now().Add(time.Second)) {
			break
		}
		if time.Now().After(end) {
			b.Errorf("its clock shows %v at %v", told, before)
			break
		}
	}

	first := b.monotonic()
	time.Sleep(5 * time.Second)
	second := b.monotonic()
	passed, least, most := second.shown-first.shown, second.asked.Sub(first.told), second.told.Sub(first.asked)
	b.Logf("%v passed in the guest, between %v and %v here", passed, least, most)
	if passed < least*98/100 || passed > most*102/100 {
		b.Errorf("%v passed in the guest, between %v and %v here", passed, least, most)
	}
}

// checkProcessors checks that the guest has its processors and that each of them
// is interrupted by its timer.
func (b *bench) checkProcessors() {
	b.Helper()
	if n := b.number("nproc"); n != b.spec.VCPUs {
		b.Errorf("it has %d processors", n)
	}
	for i := range b.spec.VCPUs {
		b.sh(fmt.Sprintf("taskset -c %d sleep 0.1", i))
	}
}
