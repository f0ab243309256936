// Package scheduler chooses the hosts of sandboxes. It decides from what it is
// given and touches nothing: the room of sandboxes reserves, in the database,
// what it chose.
package scheduler

import (
	"bytes"
	"slices"

	"github.com/google/uuid"
)

// Host is what there is to know of one host when a sandbox is placed.
type Host struct {
	ID uuid.UUID
	// MemoryMiB is what sandboxes may have together, CPUs the host's
	// processors; 0: not known, and not a limit.
	MemoryMiB int64
	CPUs      int64
	// What sandboxes have, those in transit among them.
	UsedMemoryMiB, UsedVCPUs int64
	// Sandboxes is how many those are; Slots how many there can be, 0: not known.
	Sandboxes, Slots int64
	// DiskMiB is the size of its disk; 0 is unknown, and no limit. FreeDiskMiB is free
	// for sandboxes, PromisedDiskMiB is what those on the host have yet to write.
	DiskMiB, FreeDiskMiB, PromisedDiskMiB int64
	Tags                                  []string
}

// Request is what a sandbox needs.
type Request struct {
	MemoryMiB int64
	VCPUs     int64
	// DiskMiB is what it has yet to write beside its own disk: its saved memory.
	DiskMiB int64
	// Tags that the host must have, all of them.
	Tags []string
}

// Policy is how far hosts may be filled. The zero Policy sets no bounds but
// the number of slots.
type Policy struct {
	// MemoryFactor and VCPUFactor say how much may be promised of what there
	// is, 1 being all of it once; 0: any amount.
	MemoryFactor, VCPUFactor float64
	// OverheadMiB is counted for each sandbox beside its memory.
	OverheadMiB int64
}

// Fits says whether a host has room for a request and the tags that it asks for.
func (p Policy) Fits(r Request, h Host) bool {
	for _, t := range r.Tags {
		if !slices.Contains(h.Tags, t) {
			return false
		}
	}
	// A sandbox with more processors than there are would not even be slow:
	// no host takes it.
	if h.CPUs > 0 && r.VCPUs > h.CPUs {
		return false
	}
	if h.Slots > 0 && h.Sandboxes >= h.Slots {
		return false
	}
	if h.DiskMiB > 0 && h.PromisedDiskMiB+r.DiskMiB >= h.FreeDiskMiB {
		return false
	}
	memory, vcpus := p.load(r, h)
	return memory <= 1 && vcpus <= 1
}

// load is which part of the host's memory and processors would be promised
// with the request on it, 1 being all that may be.
func (p Policy) load(r Request, h Host) (memory, vcpus float64) {
	part := func(used, total int64, factor float64) float64 {
		if total <= 0 || factor <= 0 {
			return 0
		}
		return float64(used) / (float64(total) * factor)
	}
	used := h.UsedMemoryMiB + h.Sandboxes*p.OverheadMiB
	return part(used+r.MemoryMiB+p.OverheadMiB, h.MemoryMiB, p.MemoryFactor), part(h.UsedVCPUs+r.VCPUs, h.CPUs, p.VCPUFactor)
}

// Rank returns the hosts that a request fits on, the one to try first first:
// the one that is then the least full by what it is fullest of. Of hosts that
// are alike the one with fewer sandboxes goes first, so that load spreads
// where nothing is known of it.
func (p Policy) Rank(r Request, hosts []Host) []Host {
	fit := slices.DeleteFunc(slices.Clone(hosts), func(h Host) bool { return !p.Fits(r, h) })
	full := func(h Host) float64 {
		memory, vcpus := p.load(r, h)
		return max(memory, vcpus)
	}
	slices.SortFunc(fit, func(a, b Host) int {
		if x, y := full(a), full(b); x != y {
			if x < y {
				return -1
			}
			return 1
		}
		if a.Sandboxes != b.Sandboxes {
			return int(a.Sandboxes - b.Sandboxes)
		}
		return bytes.Compare(a.ID[:], b.ID[:])
	})
	return fit
}
