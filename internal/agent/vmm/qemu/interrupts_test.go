package qemu

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
)

// section returns a device's section in the state of a machine.
func section(id uint32, name string, version uint32, data []byte) []byte {
	s := binary.BigEndian.AppendUint32([]byte{sectionFull}, id)
	s = append(append(s, byte(len(name))), name...)
	s = binary.BigEndian.AppendUint32(s, 0)
	s = binary.BigEndian.AppendUint32(s, version)
	s = append(append(s, data...), sectionFooter)
	return binary.BigEndian.AppendUint32(s, id)
}

// interrupts describes the state of a machine's interrupt controllers.
type interrupts struct {
	entries  [2]uint64 // pin 21 of the first and of the second I/O APIC
	isr, irr [2]uint8  // a vector in service, or requested, in each local APIC
}

func (in interrupts) state() []byte {
	state := []byte("QEVM\x00\x00\x00\x03")
	state = append(state, section(1, "timer", 2, []byte("\x06ioapic apic"))...)
	for i := range 2 {
		apic := make([]byte, apicBytes+80)
		apic[apicID], apic[apicLogDest] = byte(i), 1<<i
		if in.isr[i] != 0 {
			setVector(apic[apicISR:], in.isr[i])
		}
		if in.irr[i] != 0 {
			setVector(apic[apicIRR:], in.irr[i])
		}
		state = append(state, section(uint32(2+i), "apic", apicVersion, apic)...)
	}
	for i, entry := range in.entries {
		ioapic := make([]byte, ioapicBytes)
		binary.BigEndian.PutUint64(ioapic[ioapicEntries+8*21:], entry)
		state = append(state, section(uint32(4+i), "ioapic", ioapicVersion, ioapic)...)
	}
	return append(state, 0)
}

func TestRedeliver(t *testing.T) {
	const vector = 37
	level := uint64(vector | entryLevel | entryRemoteIRR)
	for _, c := range []struct {
		name string
		is   interrupts
		want interrupts // after the repair
		n    int
	}{
		{name: "nothing pending", is: interrupts{entries: [2]uint64{vector | entryLevel}}},
		{name: "edge", is: interrupts{entries: [2]uint64{0, vector | entryRemoteIRR}}},
		{name: "masked", is: interrupts{entries: [2]uint64{0, level | entryMasked}}},
		{name: "in service", is: interrupts{entries: [2]uint64{0, level}, isr: [2]uint8{0, vector}}},
		{name: "requested", is: interrupts{entries: [2]uint64{0, level}, irr: [2]uint8{vector}}},
		{
			name: "lost", n: 1,
			is:   interrupts{entries: [2]uint64{0, level}, isr: [2]uint8{38, 36}},
			want: interrupts{entries: [2]uint64{0, level}, isr: [2]uint8{38, 36}, irr: [2]uint8{vector}},
		},
		{
			name: "lost, for the second processor", n: 1,
			is:   interrupts{entries: [2]uint64{0, level | 1<<entryDest}},
			want: interrupts{entries: [2]uint64{0, level | 1<<entryDest}, irr: [2]uint8{0, vector}},
		},
		{
			name: "lost, for a mask of processors", n: 1,
			is:   interrupts{entries: [2]uint64{0, level | entryLogical | 2<<entryDest}},
			want: interrupts{entries: [2]uint64{0, level | entryLogical | 2<<entryDest}, irr: [2]uint8{0, vector}},
		},
		{
			name: "two lost", n: 2,
			is:   interrupts{entries: [2]uint64{level + 1, level | 1<<entryDest}},
			want: interrupts{entries: [2]uint64{level + 1, level | 1<<entryDest}, irr: [2]uint8{vector + 1, vector}},
		},
	} {
		before := c.is.state()
		given := slices.Clone(before)
		got, n := redeliver(given)
		if !bytes.Equal(given, before) {
			t.Errorf("%s: the input changed", c.name)
		}
		want := before
		if c.n > 0 {
			want = c.want.state()
			// Level-triggered, like the interrupts that the kernel delivers itself.
			for i, apic := range sections(want, "apic", apicVersion, apicBytes, false) {
				if c.want.irr[i] != 0 {
					setVector(apic[apicTMR:], c.want.irr[i])
				}
			}
		}
		if n != c.n || !bytes.Equal(got, want) {
			t.Errorf("%s: repaired %d, want %d; the state is right: %v", c.name, n, c.n, bytes.Equal(got, want))
		}
		if _, again := redeliver(got); again != 0 {
			t.Errorf("%s: %d interrupts are lost after the repair", c.name, again)
		}
	}
}

// FuzzRedeliver parses what a hostile QEMU could have saved.
func FuzzRedeliver(f *testing.F) {
	f.Add(interrupts{entries: [2]uint64{0, 37 | entryLevel | entryRemoteIRR}}.state())
	f.Add([]byte("\x04\x00\x00\x00\x01\x06ioapic"))
	f.Fuzz(func(t *testing.T, state []byte) {
		got, n := redeliver(state)
		if len(got) != len(state) || n == 0 && !bytes.Equal(got, state) {
			t.Errorf("%d bytes became %d with %d repaired", len(state), len(got), n)
		}
	})
}
