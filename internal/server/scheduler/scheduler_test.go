package scheduler

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/uuid"
)

func ids(hosts []Host) []byte {
	var names []byte
	for _, h := range hosts {
		names = append(names, h.ID[15])
	}
	return names
}

func TestRank(t *testing.T) {
	a, b, c := uuid.UUID{15: 1}, uuid.UUID{15: 2}, uuid.UUID{15: 3}
	policy := Policy{MemoryFactor: 1, VCPUFactor: 4, OverheadMiB: 64}
	tests := []struct {
		name  string
		p     Policy
		r     Request
		hosts []Host
		want  []byte
	}{
		{"no hosts", policy, Request{MemoryMiB: 512, VCPUs: 1}, nil, nil},
		{"the emptier first", policy, Request{MemoryMiB: 512, VCPUs: 1}, []Host{
			{ID: a, MemoryMiB: 8192, CPUs: 4, UsedMemoryMiB: 4096, UsedVCPUs: 2, Sandboxes: 1},
			{ID: b, MemoryMiB: 8192, CPUs: 4},
		}, []byte{2, 1}},
		{"the larger of two that have the same on them", policy, Request{MemoryMiB: 512, VCPUs: 1}, []Host{
			{ID: a, MemoryMiB: 4096, CPUs: 4}, {ID: b, MemoryMiB: 8192, CPUs: 4},
		}, []byte{2, 1}},
		{"processors may be what is short", policy, Request{MemoryMiB: 512, VCPUs: 1}, []Host{
			{ID: a, MemoryMiB: 65536, CPUs: 1, UsedVCPUs: 3}, {ID: b, MemoryMiB: 8192, CPUs: 4, UsedMemoryMiB: 4096},
		}, []byte{2, 1}},
		{"to the last MiB, overhead and all", policy, Request{MemoryMiB: 512, VCPUs: 1}, []Host{
			{ID: a, MemoryMiB: 1151, CPUs: 4, UsedMemoryMiB: 511, Sandboxes: 1},
			{ID: b, MemoryMiB: 1152, CPUs: 4, UsedMemoryMiB: 512, Sandboxes: 1},
			{ID: c, MemoryMiB: 1151, CPUs: 4, UsedMemoryMiB: 512, Sandboxes: 1},
		}, []byte{1, 2}},
		{"more may be promised than there is", Policy{MemoryFactor: 2}, Request{MemoryMiB: 512, VCPUs: 1}, []Host{
			{ID: a, MemoryMiB: 1024, UsedMemoryMiB: 1536}, {ID: b, MemoryMiB: 1024, UsedMemoryMiB: 1537},
		}, []byte{1}},
		{"no sandbox with more processors than there are", Policy{}, Request{VCPUs: 3}, []Host{{ID: a, CPUs: 2}, {ID: b, CPUs: 3}}, []byte{2}},
		{"no slot free", Policy{}, Request{VCPUs: 1}, []Host{{ID: a, Slots: 2, Sandboxes: 2}, {ID: b, Slots: 2, Sandboxes: 1}}, []byte{2}},
		{"tags", Policy{}, Request{Tags: []string{"gpu", "eu"}}, []Host{{ID: a, Tags: []string{"gpu"}}, {ID: b, Tags: []string{"eu", "x", "gpu"}}, {ID: c}}, []byte{2}},
		{"a disk with room for what is saved", Policy{}, Request{DiskMiB: 512}, []Host{
			{ID: a, DiskMiB: 9000, FreeDiskMiB: 1024, PromisedDiskMiB: 512}, {ID: b, DiskMiB: 9000, FreeDiskMiB: 1024, PromisedDiskMiB: 511}, {ID: c},
		}, []byte{2, 3}},
		{"a disk that is full", Policy{}, Request{}, []Host{{ID: a, DiskMiB: 9000}, {ID: b, DiskMiB: 9000, FreeDiskMiB: 1}}, []byte{2}},
		{"nothing is known", policy, Request{MemoryMiB: 1 << 20, VCPUs: 64}, []Host{{ID: b}, {ID: a}, {ID: c, Sandboxes: 1}}, []byte{1, 2, 3}},
	}
	for _, tt := range tests {
		if got := ids(tt.p.Rank(tt.r, tt.hosts)); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestFill places random sandboxes on random hosts until nothing fits any more, and
// removes some in between. At every step, no host exceeds its bounds; a ranked host fits,
// is no worse than the next, and has every tag; and a host that is not ranked does not
// fit.
func TestFill(t *testing.T) {
	tags := []string{"a", "b", "c"}
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		p := Policy{MemoryFactor: 0.5 + 2*rng.Float64(), VCPUFactor: 1 + 8*rng.Float64(), OverheadMiB: rng.Int64N(128)}
		hosts := make([]Host, 1+rng.IntN(8))
		for i := range hosts {
			hosts[i] = Host{ID: uuid.New(), MemoryMiB: 512 + rng.Int64N(16384), CPUs: 1 + rng.Int64N(16), Slots: 1 + rng.Int64N(64)}
			for _, tag := range tags {
				if rng.IntN(2) == 0 {
					hosts[i].Tags = append(hosts[i].Tags, tag)
				}
			}
		}
		type placed struct {
			on int
			Request
		}
		var all []placed
		for refused := 0; refused < 50; {
			if len(all) > 0 && rng.IntN(5) == 0 {
				i := rng.IntN(len(all))
				gone := all[i]
				all = slices.Delete(all, i, i+1)
				h := &hosts[gone.on]
				h.UsedMemoryMiB, h.UsedVCPUs, h.Sandboxes = h.UsedMemoryMiB-gone.MemoryMiB, h.UsedVCPUs-gone.VCPUs, h.Sandboxes-1
			}
			r := Request{MemoryMiB: 64 + rng.Int64N(2048), VCPUs: 1 + rng.Int64N(4)}
			for _, tag := range tags {
				if rng.IntN(5) == 0 {
					r.Tags = append(r.Tags, tag)
				}
			}
			before := slices.Clone(hosts)
			ranked := p.Rank(r, hosts)
			if !slices.EqualFunc(before, hosts, func(a, b Host) bool { return a.ID == b.ID }) {
				t.Fatal("Rank reordered its input")
			}
			worst := 0.0
			for _, h := range ranked {
				if !p.Fits(r, h) {
					t.Fatalf("seed %d: %+v does not fit on %+v", seed, r, h)
				}
				memory, vcpus := p.load(r, h)
				if full := max(memory, vcpus); full < worst {
					t.Fatalf("seed %d: a host that is less full comes later", seed)
				} else {
					worst = full
				}
			}
			for _, h := range hosts {
				if p.Fits(r, h) != slices.ContainsFunc(ranked, func(o Host) bool { return o.ID == h.ID }) {
					t.Fatalf("seed %d: whether %+v fits on %+v depends on other hosts", seed, r, h)
				}
			}
			if len(ranked) == 0 {
				refused++
				continue
			}
			i := slices.IndexFunc(hosts, func(h Host) bool { return h.ID == ranked[0].ID })
			h := &hosts[i]
			h.UsedMemoryMiB, h.UsedVCPUs, h.Sandboxes = h.UsedMemoryMiB+r.MemoryMiB, h.UsedVCPUs+r.VCPUs, h.Sandboxes+1
			all = append(all, placed{i, r})
			if got := float64(h.UsedMemoryMiB + h.Sandboxes*p.OverheadMiB); got > float64(h.MemoryMiB)*p.MemoryFactor*(1+1e-9) {
				t.Fatalf("seed %d: %v MiB reserved of %d", seed, got, h.MemoryMiB)
			}
			if float64(h.UsedVCPUs) > float64(h.CPUs)*p.VCPUFactor*(1+1e-9) || h.Sandboxes > h.Slots {
				t.Fatalf("seed %d: overfull: %+v", seed, *h)
			}
			for _, tag := range r.Tags {
				if !slices.Contains(h.Tags, tag) {
					t.Fatalf("seed %d: host without tag %s", seed, tag)
				}
			}
		}
	}
}

// TestSpread places equal sandboxes on equal hosts: their numbers differ by one at most.
func TestSpread(t *testing.T) {
	p := Policy{MemoryFactor: 1, VCPUFactor: 32, OverheadMiB: 64}
	hosts := []Host{{ID: uuid.New(), MemoryMiB: 16384, CPUs: 2}, {ID: uuid.New(), MemoryMiB: 16384, CPUs: 2}, {ID: uuid.New(), MemoryMiB: 16384, CPUs: 2}}
	r := Request{MemoryMiB: 128, VCPUs: 1}
	for range 31 {
		first := p.Rank(r, hosts)[0].ID
		for i := range hosts {
			if hosts[i].ID == first {
				hosts[i].UsedMemoryMiB, hosts[i].UsedVCPUs, hosts[i].Sandboxes = hosts[i].UsedMemoryMiB+128, hosts[i].UsedVCPUs+1, hosts[i].Sandboxes+1
			}
		}
	}
	for _, h := range hosts {
		if h.Sandboxes < 10 || h.Sandboxes > 11 {
			t.Errorf("%d sandboxes on a host, want 10 or 11", h.Sandboxes)
		}
	}
}
