package network

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/google/nftables"
	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A guard puts a block's table on the host back when someone removes it, as
// every reload of nftables' own service does: it flushes all rules there are.
type guard struct {
	block     int
	upstreams []netip.Addr
	log       *slog.Logger
	host      *netlink.Handle
	events    *mdnetlink.Conn
	closing   atomic.Bool
	watching  sync.WaitGroup
}

func newGuard(h *netlink.Handle, block int, upstreams []netip.Addr, log *slog.Logger) (*guard, error) {
	c, err := mdnetlink.Dial(unix.NETLINK_NETFILTER, &mdnetlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
	if err != nil {
		return nil, fmt.Errorf("watch the host's rules: %w", err)
	}
	g := &guard{block: block, upstreams: upstreams, log: log, host: h, events: c}
	g.watching.Go(g.watch)
	return g, nil
}

// close ends the guard's watch; from then on the table can be removed.
func (g *guard) close() {
	g.closing.Store(true)
	g.events.Close()
	g.watching.Wait()
}

func (g *guard) watch() {
	const removal = mdnetlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELTABLE)
	for {
		messages, err := g.events.Receive()
		switch {
		case g.closing.Load():
			return
		case errors.Is(err, unix.ENOBUFS): // more happened than we can be told
		case err != nil:
			g.log.Error("no longer watching the host's firewall", "error", err)
			return
		case !slices.ContainsFunc(messages, func(m mdnetlink.Message) bool { return m.Header.Type == removal }):
			continue
		}
		if err := g.restore(); err != nil {
			g.log.Error("cannot restore the rules for guests", "error", err)
		}
	}
}

func (g *guard) restore() error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("list nftables: %w", err)
	}
	for _, t := range tables {
		if t.Name == hostTable(g.block) {
			return nil
		}
	}
	g.log.Warn("someone removed the rules for guests; putting them back", "table", hostTable(g.block))
	if err := hostRules(g.block, g.upstreams); err != nil {
		return err
	}
	_, _ = g.host.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, bare(blockPrefix(g.block)))
	return nil
}

// bare matches connections that guests of a block opened while nothing
// translated their addresses; forgotten, they get a second chance.
type bare netip.Prefix

// MatchConntrackFlow implements [netlink.CustomConntrackFilter].
func (b bare) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	src, _ := netip.AddrFromSlice(f.Forward.SrcIP)
	src = src.Unmap()
	// The even addresses are the host's ends.
	return netip.Prefix(b).Contains(src) && src.As4()[3]%2 == 1 && f.Forward.SrcIP.Equal(f.Reverse.DstIP)
}

// Obstacles are other programs' firewall chains on this machine that may drop
// what guests send or get: a rule of ours can close a door, not open one that
// somebody else's closes.
func Obstacles() []string {
	conn, err := nftables.New()
	if err != nil {
		return nil
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil
	}
	var found []string
	for _, c := range chains {
		if c.Table == nil || c.Hooknum == nil || c.Policy == nil || *c.Hooknum != *nftables.ChainHookForward || *c.Policy != nftables.ChainPolicyDrop {
			continue
		}
		family, ok := map[nftables.TableFamily]string{nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip"}[c.Table.Family]
		if !ok || c.Table.Name == "wrenn" || strings.HasPrefix(c.Table.Name, "wrenn-") {
			continue
		}
		found = append(found, fmt.Sprintf("the firewall's chain %s %s %s drops what it forwards unless a rule there accepts it: accept what comes in from %s*, and replies to it", family, c.Table.Name, c.Name, linkPrefix))
	}
	return found
}
