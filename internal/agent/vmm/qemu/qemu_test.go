package qemu

import (
	"log/slog"
	"os"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
	"github.com/wrenn-dev/wrenn/internal/await"
)

// balloon says that the guests of all tests return memory that they free:
// WRENN_TEST_BALLOON.
var balloon = os.Getenv("WRENN_TEST_BALLOON") != ""

// subject is the driver under test.
var subject = vmmtest.Subject{
	New: opener(""),
	Needs: func() error {
		_, err := Program.Find()
		return err
	},
	Hostile: map[string]vmmtest.Hostile{
		"silent":         {New: opener(silent)},
		"garbage":        {New: opener(garbage)},
		"endless":        {New: opener(endless)},
		"liar":           {New: opener(liar), Starts: true},
		"forbidden call": {New: opener(forbidden), Starts: true},
	},
	Forget:    func(vm vmm.VM) { _ = vm.(*machine).qmp.Close() },
	Complains: "QEMU's error output",
	// The guest's own reason, not "host-qmp-quit", which is the driver's way to end QEMU.
	Rebooted: "the guest shut down (guest-reset)",
	Returns:  balloon,
	Devices:  checkDevices,
}

// opener opens the driver with a fake QEMU, or with QEMU if standIn is empty.
func opener(standIn string) vmmtest.Opener {
	return func(dir string, log *slog.Logger) (vmm.Driver, error) {
		d, err := Open(vmmtest.Accelerator(), vmm.Config{Dir: dir, Balloon: balloon, Log: log})
		if err != nil {
			return nil, err
		}
		d.standIn, d.starts = standIn, await.Scale(startTimeout)
		return d, nil
	}
}

func TestConformance(t *testing.T) { vmmtest.Conformance(t, subject) }

// checkDevices checks that the interrupt controllers are where QEMU's sources put them,
// and that no interrupt is lost.
func checkDevices(t *testing.T, s vmm.Spec, devices []byte) {
	t.Helper()
	apics, ioapics := sections(devices, "apic", apicVersion, apicBytes, false), sections(devices, "ioapic", ioapicVersion, ioapicBytes, true)
	if len(apics) != s.VCPUs || len(ioapics) == 0 {
		t.Errorf("the state has %d local and %d I/O APICs", len(apics), len(ioapics))
	}
	if lost := lostInterrupts(devices); len(lost) > 0 {
		t.Errorf("the state has lost the ends of %d interrupts", len(lost))
	}
}

func TestTSC(t *testing.T) {
	a, err := tscKHz()
	if err != nil {
		t.Fatal(err)
	}
	b, err := tscKHz()
	if err != nil {
		t.Fatal(err)
	}
	if d := a - b; d > a/1000 || -d > a/1000 {
		t.Errorf("measured %d and then %d kHz", a, b)
	}
}

func TestParseStartTime(t *testing.T) {
	got, err := parseStartTime("7 (a) b) c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 0 0")
	if err != nil || got != 12345 {
		t.Errorf("got %d, %v", got, err)
	}
	for _, bad := range []string{"", "7 (a", "7 (a) S 1"} {
		if _, err := parseStartTime(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func FuzzParseStartTime(f *testing.F) {
	f.Fuzz(func(_ *testing.T, s string) { _, _ = parseStartTime(s) })
}
