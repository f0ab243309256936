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
	// Address is where the host reaches the guest.
	Address() netip.Addr
	// NetNS is the path of the network namespace to run the guest in.
	NetNS() string
	// Limit sets the network rates of the guest from now on.
	Limit(r rates.Rates) error
	// OpenTap opens the guest's network card; the caller closes it.
	OpenTap() (*os.File, error)
	// Describe sets the document that the guest finds at its metadata address.
	Describe(doc any) error
}

// Networks hands out networks: in service a [network.Pool], see [Pool].
type Networks interface {
	Acquire(ctx context.Context) (Slot, error)
	// Reclaim takes back the slot of a VM that runs as the process pid. It can be
	// called again after an error.
	Reclaim(ctx context.Context, index, pid int) (Slot, error)
	// Forget removes a slot that was kept for a VM that has ended. A slot that is
	// not kept, or was reclaimed, is no error.
	Forget(index int)
	Release(ctx context.Context, s Slot) error
}

// Pool makes Networks of a pool.
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
