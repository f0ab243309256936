package qemu

import (
	"bytes"
	"encoding/binary"
	"slices"
)

// The state of a machine's devices is a migration stream (QEMU's docs/devel/migration.rst):
// for each device a header, its fields in big-endian order and a footer. [redeliver] reads
// these parts.
const (
	sectionFull   = 0x04 // QEMU_VM_SECTION_FULL
	sectionFooter = 0x7e // QEMU_VM_SECTION_FOOTER

	// hw/intc/ioapic_common.c, vmstate_ioapic_common: id, ioregsel, 8 unused
	// bytes, irr (32 bits), then 24 entries of 64 bits.
	ioapicVersion = 3
	ioapicEntries = 14
	ioapicPins    = 24
	ioapicBytes   = ioapicEntries + 8*ioapicPins

	// hw/intc/apic_common.c, vmstate_apic_common: apicbase (32 bits), id, arb_id,
	// tpr, spurious_vec (32 bits), log_dest, dest_mode, then isr, tmr and irr of
	// eight 32-bit words each, and more.
	apicVersion = 3
	apicID      = 4
	apicLogDest = 11
	apicISR     = 13
	apicTMR     = apicISR + 32
	apicIRR     = apicTMR + 32
	apicBytes   = apicIRR + 32
)

// An entry of the I/O APIC's redirection table (Intel 82093AA, 3.2.4).
const (
	entryLogical   = 1 << 11 // the destination is a mask
	entryRemoteIRR = 1 << 14 // delivered, but not ended yet
	entryLevel     = 1 << 15
	entryMasked    = 1 << 16
	entryDest      = 56
)

// lost is an interrupt whose end was lost: the I/O APIC waits for the end before it delivers
// another, but no processor has the interrupt.
type lost struct {
	vector uint8
	dest   []byte // the local APIC to which it was delivered
}

// redeliver repairs the saved state of a machine with a split irqchip. There, KVM reports
// the end of a level-triggered interrupt to QEMU as an exit (KVM_EXIT_IOAPIC_EOI). If QEMU
// stops the machine before it handles the exit, the exit is lost, because it is not part of
// the state, and the restored device never interrupts again. redeliver delivers such an
// interrupt once more, so that the guest ends it. It returns the state, copied if changed,
// and the number of repaired interrupts.
func redeliver(state []byte) ([]byte, int) {
	if len(lostInterrupts(state)) == 0 {
		return state, 0
	}
	state = slices.Clone(state)
	all := lostInterrupts(state)
	for _, l := range all {
		setVector(l.dest[apicTMR:], l.vector)
		setVector(l.dest[apicIRR:], l.vector)
	}
	return state, len(all)
}

// lostInterrupts returns the interrupts in a state whose end was lost.
func lostInterrupts(state []byte) (all []lost) {
	apics := sections(state, "apic", apicVersion, apicBytes, false)
	if len(apics) == 0 {
		return nil
	}
	for _, ioapic := range sections(state, "ioapic", ioapicVersion, ioapicBytes, true) {
		for pin := range ioapicPins {
			entry := binary.BigEndian.Uint64(ioapic[ioapicEntries+8*pin:])
			if entry&entryRemoteIRR == 0 || entry&entryLevel == 0 || entry&entryMasked != 0 {
				continue
			}
			vector := uint8(entry)
			known := func(apic []byte) bool {
				return hasVector(apic[apicISR:], vector) || hasVector(apic[apicIRR:], vector)
			}
			if vector < 16 || slices.ContainsFunc(apics, known) {
				continue
			}
			all = append(all, lost{vector, destination(apics, entry)})
		}
	}
	return all
}

// destination returns the local APIC to which an entry's interrupts go.
func destination(apics [][]byte, entry uint64) []byte {
	dest := byte(entry >> entryDest)
	for _, apic := range apics {
		if entry&entryLogical != 0 && apic[apicLogDest]&dest != 0 || entry&entryLogical == 0 && apic[apicID] == dest {
			return apic
		}
	}
	return apics[0]
}

// sections returns the first size bytes of each device in a state with the name and version.
// whole says that devices have exactly these bytes, so that a footer must follow.
func sections(state []byte, name string, version uint32, size int, whole bool) (all [][]byte) {
	mark := append([]byte{byte(len(name))}, name...)
	for at := 0; ; {
		i := bytes.Index(state[at:], mark)
		if i < 0 {
			return all
		}
		i += at
		at = i + 1
		data := i + len(mark) + 8 // after instance and version
		if i < 5 || state[i-5] != sectionFull || data+size > len(state) ||
			binary.BigEndian.Uint32(state[data-4:]) != version {
			continue
		}
		end := data + size
		if whole && (end+5 > len(state) || state[end] != sectionFooter || !bytes.Equal(state[end+1:end+5], state[i-4:i])) {
			continue
		}
		all = append(all, state[data:end:end])
	}
}

// A local APIC's registers for vectors are eight words of 32 bits.

func hasVector(words []byte, vector uint8) bool {
	return binary.BigEndian.Uint32(words[vector/32*4:])&(1<<(vector%32)) != 0
}

func setVector(words []byte, vector uint8) {
	w := words[vector/32*4:]
	binary.BigEndian.PutUint32(w, binary.BigEndian.Uint32(w)|1<<(vector%32))
}
