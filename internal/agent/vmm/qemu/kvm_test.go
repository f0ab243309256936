package qemu

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
	"github.com/wrenn-dev/wrenn/internal/await"
)

// bench is a [vmmtest.Bench] that also reads the guest's clocks and checks its processors.
type bench struct{ *vmmtest.Bench }

// TestGuestUnderKVM checks what differs from emulation: the guest's clocks and
// processors, before it is saved and after it is restored.
func TestGuestUnderKVM(t *testing.T) {
	if vmmtest.Accelerator() != KVM {
		t.Skip("needs KVM: make test-kvm")
	}
	b := bench{subject.NewBench(t)}
	b.Spec.VCPUs = 2
	b.Spec.Cmdline = guest.Cmdline("kvm-test")
	b.Boot("first")
	b.Sh(clockServer)
	b.checkClocks()
	b.checkProcessors()
	b.Sh("sync")
	before := b.monotonic()
	b.Must(b.VM.Hold(t.Context()))
	held := time.Since(before.asked)
	image, devices := b.Save(nil) // expects a local APIC for each processor
	b.Kill()
	ram, err := image.Materialize(t.Context(), "saved")
	b.Must(err)
	defer ram.Close()

	time.Sleep(2 * time.Second) // real time: the guest's clock must not show the time for which it was saved
	b.Spec.ID = uuid.New()
	begun := time.Now()
	b.Resume(vmm.Saved{Memory: ram, Devices: devices}, "first", "second")
	after := b.monotonic()
	if most := before.shown + held + after.told.Sub(begun); after.shown < before.shown || after.shown > most {
		t.Errorf("the guest's monotonic clock showed %v, and after the restore %v, want %v at most", before.shown, after.shown, most)
	}
	b.checkClocks()
	b.checkProcessors()
}

// clockServer is a program that responds to each packet with its content and the monotonic
// clock.
const clockServer = `setsid python3 -c '
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 9))
while True:
    what, whom = s.recvfrom(2048)
    s.sendto(b"%s %d" % (what, time.monotonic_ns()), whom)' >/dev/null 2>&1 &`

// reading is a value of the guest's monotonic clock, taken between two times of the host's.
type reading struct {
	shown       time.Duration
	asked, told time.Time
}

// monotonic asks the guest's clock server for a reading.
func (b bench) monotonic() reading {
	b.Helper()
	conn, err := net.Dial("udp", net.JoinHostPort(b.Slot.Address.String(), "9"))
	b.Must(err)
	defer conn.Close()
	buf := make([]byte, 100)
	var read reading
	await.Until(b.T, "the guest reports its time", func() bool {
		asked := time.Now()
		what := strconv.FormatInt(asked.UnixNano(), 10)
		_, err := conn.Write([]byte(what)) // fails until the server listens
		b.Must(conn.SetReadDeadline(asked.Add(time.Second)))
		n := 0
		if err == nil {
			n, err = conn.Read(buf)
		}
		told := time.Now()
		// A late response belongs to an earlier request.
		answer, found := strings.CutPrefix(string(buf[:n]), what+" ")
		if err != nil || !found {
			return false
		}
		ns, err := strconv.ParseInt(answer, 10, 64)
		b.Must(err)
		read = reading{time.Duration(ns), asked, told}
		return true
	})
	return read
}

// checkClocks checks the guest's clock source, and that its seconds are as long as the host's.
// They are not if the guest assumes a wrong TSC rate.
func (b bench) checkClocks() {
	b.Helper()
	if got := b.Sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"); got != "kvm-clock" {
		b.Errorf("the guest's clock source is %q", got)
	}
	if got := b.Sh("cat /sys/class/ptp/ptp0/clock_name; grep -c '^refclock PHC /dev/ptp0 ' /run/chrony.conf; pgrep -c chronyd"); got != "KVM virtual PTP\n1\n1" {
		b.Errorf("the guest's PTP clock, its lines in chrony.conf, and the chronyd processes: %q", got)
	}
	// chronyd has no other source from which it could correct the clock.
	b.Sh("date -s '+2 hours'")
	await.Until(b.T, "the guest's clock is right", func() bool {
		before := time.Now()
		s, err := strconv.ParseFloat(b.Sh("date +%s.%N"), 64)
		b.Must(err)
		told := time.UnixMicro(int64(s * 1e6))
		return told.After(before.Add(-time.Second)) && told.Before(time.Now().Add(time.Second))
	})

	first := b.monotonic()
	time.Sleep(2 * time.Second) // real time: it takes two moments to measure a rate
	second := b.monotonic()
	passed, least, most := second.shown-first.shown, second.asked.Sub(first.told), second.told.Sub(first.asked)
	b.Logf("%v passed in the guest, between %v and %v on the host", passed, least, most)
	if passed < least*98/100 || passed > most*102/100 {
		b.Errorf("%v passed in the guest, between %v and %v on the host", passed, least, most)
	}
}

// checkProcessors checks that the guest has its processors, and that each gets timer
// interrupts.
func (b bench) checkProcessors() {
	b.Helper()
	if n := b.Number("nproc"); n != b.Spec.VCPUs {
		b.Errorf("the guest has %d processors", n)
	}
	for i := range b.Spec.VCPUs {
		b.Sh(fmt.Sprintf("taskset -c %d sleep 0.1", i)) // real time: the timer is what it checks
	}
}

// TestOlderMachinesAreRepaired pauses a machine of an earlier release's model, which loses
// interrupts, under load. WRENN_TEST_PAUSES is the number of pauses (3).
func TestOlderMachinesAreRepaired(t *testing.T) {
	if vmmtest.Accelerator() != KVM {
		t.Skip("needs KVM, where that model loses interrupts: make test-kvm")
	}
	all := models[KVM]
	i := slices.IndexFunc(all, func(m model) bool { return m.repaired })
	models[KVM] = all[i : i+1]
	defer func() { models[KVM] = all }()
	loses, lost := subject, 0
	loses.Devices = func(_ *testing.T, _ vmm.Spec, devices []byte) { lost += len(lostInterrupts(devices)) }
	pauses := vmmtest.Count(t, "WRENN_TEST_PAUSES", 3)
	loses.NewBench(t).PauseUnderLoad(pauses)
	t.Logf("%d pauses lost the ends of %d interrupts", pauses, lost)
}
