package sandbox

import (
	"context"
	"fmt"
	"net/netip"
	"os"

	"github.com/wrenn-dev/wrenn/internal/agent/network"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
)

// Slot is one guest's network.
type Slot interface {
	// Index is the slot's number on this machine.
	Index() int
	// Address is the address at which the host reaches the guest.
	Address() netip.Addr
	// NetNS is the path of the network namespace for the guest's machine.
	NetNS() string
	// Limit sets the guest's network rates.
	Limit(r rates.Rates) error
	// OpenTap opens the guest's network card. The caller must close it.
	OpenTap() (*os.File, error)
	// Describe sets the document that the guest finds at its metadata address.
	Describe(doc any) error
}

// Networks provides networks for guests. In production it is a [network.Pool]; see [Pool].
type Networks interface {
	Acquire(ctx context.Context) (Slot, error)
	// Reclaim adopts the slot of a VM that runs as the process pid. After an error, the
	// caller can try again.
	Reclaim(ctx context.Context, index, pid int) (Slot, error)
	// Forget removes a slot that was kept for a VM that has ended. It does nothing for a slot
	// that is not kept or was reclaimed.
	Forget(index int)
	Release(ctx context.Context, s Slot) error
}

// Pool wraps a pool as Networks.
func Pool(p *network.Pool) Networks { return pool{p} }

type pool struct{ p *network.Pool }

func (p pool) Acquire(ctx context.Context) (Slot, error) { return slotOf(p.p.Acquire(ctx)) }

func (p pool) Reclaim(ctx context.Context, i, pid int) (Slot, error) {
	return slotOf(p.p.Reclaim(ctx, i, pid))
}

func (p pool) Forget(i int) { p.p.Forget(i) }

func (p pool) Release(ctx context.Context, s Slot) error {
	own, ok := s.(slot)
	if !ok {
		return fmt.Errorf("slot %d is not of this pool", s.Index())
	}
	return p.p.Release(ctx, own.Slot)
}

func slotOf(s *network.Slot, err error) (Slot, error) {
	if err != nil {
		return nil, err
	}
	return slot{s}, nil
}

type slot struct{ *network.Slot }

func (s slot) Index() int             { return s.Slot.Index }
func (s slot) Address() netip.Addr    { return s.Slot.Address }
func (s slot) Describe(doc any) error { return s.Metadata.Set(doc) }
