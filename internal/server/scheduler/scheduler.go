// Package scheduler chooses hosts for sandboxes. It consists of pure functions; package
// hosts reserves the chosen room in the database.
package scheduler

import (
	"bytes"
	"slices"

	"github.com/google/uuid"
)

// Host is what the scheduler knows of a host.
type Host struct {
	ID uuid.UUID
	// MemoryMiB is the memory for all sandboxes together, CPUs the number of CPUs; 0 is
	// unknown and not a limit.
	MemoryMiB int64
	CPUs      int64
	// Memory and virtual CPUs of the host's sandboxes, including those in transit.
	UsedMemoryMiB, UsedVCPUs int64
	// Sandboxes counts the host's sandboxes. Slots is the maximum; 0 is unknown and not a
	// limit.
	Sandboxes, Slots int64
	// DiskMiB is the size of the disk; 0 is unknown and not a limit. FreeDiskMiB is free
	// for sandboxes, and PromisedDiskMiB is what the host's sandboxes may still write.
	DiskMiB, FreeDiskMiB, PromisedDiskMiB int64
	Tags                                  []string
}

// Request is the resources that a sandbox needs.
type Request struct {
	MemoryMiB int64
	VCPUs     int64
	// DiskMiB is the space for its saved memory, beside its own disk.
	DiskMiB int64
	// Tags lists tags that the host must all have.
	Tags []string
}

// Policy limits how far hosts are filled. The zero Policy only respects the number of
// slots.
type Policy struct {
	// MemoryFactor and VCPUFactor are the overcommit: the ratio of promised to existing
	// resources, 1 for none; 0: no limit.
	MemoryFactor, VCPUFactor float64
	// OverheadMiB is added to each sandbox's memory.
	OverheadMiB int64
}

// Fits reports whether a host has the room and the tags for a request.
func (p Policy) Fits(r Request, h Host) bool {
	for _, t := range r.Tags {
		if !slices.Contains(h.Tags, t) {
			return false
		}
	}
	// No host takes a sandbox with more virtual CPUs than it has CPUs, whatever the
	// overcommit.
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

// load returns the host's load with the request on it, as a fraction of what the policy
// allows.
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

// Rank returns the hosts that a request fits on, best first. The best host has the lowest
// load of memory or CPUs, whichever is higher, with the request on it. Among equals, the
// one with fewer sandboxes comes first, so that load spreads even if sizes are unknown.
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
