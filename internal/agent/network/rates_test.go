package network

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/thread"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// flood is the size of a flood, in packets or KiB.
const flood = 4000

// TestRates floods a guest's network in both directions: packets above the rates are
// dropped, also after the agent restarts, and packets below pass.
func TestRates(t *testing.T) {
	for _, c := range []struct {
		name string
		rate rates.Rates
		size int // of a packet's data
		unit func(*netlink.LinkStatistics) (rx, tx uint64)
		most func(rates.Rates, time.Duration) float64
	}{
		{
			"packets",
			rates.Rates{NetPackets: 200, Burst: 500 * time.Millisecond},
			50,
			func(s *netlink.LinkStatistics) (rx, tx uint64) { return s.RxPackets, s.TxPackets },
			func(r rates.Rates, d time.Duration) float64 { return float64(r.NetPackets) * (0.5 + d.Seconds()) },
		},
		{
			"bytes",
			rates.Rates{NetBytes: 256 << 10, Burst: time.Second},
			1024,
			func(s *netlink.LinkStatistics) (rx, tx uint64) { return s.RxBytes, s.TxBytes },
			func(r rates.Rates, d time.Duration) float64 { return float64(r.NetBytes) * (1 + d.Seconds()) },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			needRoot(t)
			sameAfter(t)
			newInternet(t)
			dir := layout.Dir(t.TempDir())
			p := openPoolWith(t, Config{Dir: dir, Ready: 1, Rates: c.rate})
			s := acquire(t, p)
			g := newGuest(t, s)
			sent := func() uint64 { // the host's end of the veth received it
				rx, _ := hostCounters(t, s, c.unit)
				return rx
			}
			received := func() uint64 { // the tap sent it
				_, tx := g.counters(s, c.unit)
				return tx
			}
			check := func(when string, r rates.Rates) {
				t.Helper()
				for _, way := range []struct {
					name  string
					count func() uint64
					flood func() error
				}{
					{"sent", sent, func() error { return g.do(func() error { return send(internetAddr.String()+":9000", c.size) }) }},
					{"was sent", received, func() error { return send(s.Address.String()+":9000", c.size) }},
				} {
					begin, before := time.Now(), way.count()
					must(t, way.flood())
					least := uint64(c.most(r, 0) / 4) // the test's guest drops some
					got := stable(t, func() uint64 { return way.count() - before }, least)
					took := time.Since(begin)
					// Add a tenth for headers, ARP and other packets of the test's
					// machine.
					if most := uint64(c.most(r, took) * 1.1); got > most {
						t.Errorf("%s: the guest %s %d %s within %v, not at most %d", when, way.name, got, c.name, took, most)
					}
				}
			}
			check("at first", c.rate)

			// The agent restarts.
			must(t, p.Close(context.Background(), []int{s.Index}))
			p = openPoolWith(t, Config{Dir: dir, Ready: 1, Rates: c.rate}, s.Index)
			s, err := p.Reclaim(context.Background(), s.Index, 0)
			must(t, err)
			check("after a restart", c.rate)

			other := rates.Rates{NetPackets: c.rate.NetPackets / 4, NetBytes: c.rate.NetBytes / 4, Burst: c.rate.Burst}
			must(t, s.Limit(other))
			check("with other limits", other)
		})
	}
}

// stable waits until a count has reached least and stopped growing, and returns it.
func stable(t *testing.T, count func() uint64, least uint64) (n uint64) {
	t.Helper()
	await.Until(t, "the flood to pass", func() bool {
		before := n
		// real time: nothing tells when the kernel has passed the last packet. A count that only
		// pauses for this long makes the check less strict.
		time.Sleep(50 * time.Millisecond)
		n = count()
		return n == before && n >= least
	})
	return n
}

// send sends a flood of packets.
func send(to string, size int) error {
	c, err := net.Dial("udp4", to)
	if err != nil {
		return err
	}
	defer c.Close()
	b := make([]byte, size)
	for range flood {
		_, _ = c.Write(b) // nobody listens there, so the next write may fail
	}
	return nil
}

func hostCounters(t *testing.T, s *Slot, unit func(*netlink.LinkStatistics) (rx, tx uint64)) (rx, tx uint64) {
	t.Helper()
	link, err := netlink.LinkByName(linkName(s.Index))
	must(t, err)
	return unit(link.Attrs().Statistics)
}

// counters returns the counters of the guest's tap.
func (g *guest) counters(s *Slot, unit func(*netlink.LinkStatistics) (rx, tx uint64)) (rx, tx uint64) {
	g.t.Helper()
	must(g.t, s.within(func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		link, err := h.LinkByName(tapName)
		if err != nil {
			return fmt.Errorf("find %s: %w", tapName, err)
		}
		rx, tx = unit(link.Attrs().Statistics)
		return nil
	}))
	return rx, tx
}

// TestLargestRates checks that the kernel accepts every rate that the agent accepts.
func TestLargestRates(t *testing.T) {
	needRoot(t)
	for _, burst := range []time.Duration{10 * time.Millisecond, time.Minute} {
		r := rates.Rates{NetBytes: rates.Most, NetPackets: rates.Most, Burst: burst}
		must(t, r.Check())
		must(t, thread.Own(func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			return slotRules(outsideAddr(0), slotConfig{connections: minConnections, rates: r}, true)
		}))
	}
}
