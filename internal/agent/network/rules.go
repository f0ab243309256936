package network

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	mdnetlink "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// Limits on what one guest can make the host's kernel and agent do.
const (
	maxConnections = 8192 // tracked at once; see shareOfConnections
	minConnections = 32
	ntpPerSecond   = 16
	// largestPacket is one that a card with offloads takes: a lower burst would let
	// none of them pass.
	largestPacket = 64 << 10
)

// Packets from probePort, the discard service's, go no further than probeChain:
// they tell whether the host's firewalls let guests' packets pass.
const (
	probePort  = 9
	probeChain = "probe"
)

// nftTimeout bounds one transaction with nftables, which other programs'
// transactions may hold up.
const nftTimeout = 30 * time.Second

// shareOfConnections returns how many connections each of an agent's guests may have
// tracked at once: those of all agents together at most half of what the machine
// tracks. There are no more guests than slots; 0: one a slot.
func shareOfConnections(guests, agents int) uint32 {
	if guests <= 0 || guests > blockSlots {
		guests = blockSlots
	}
	table, err := trackedAtMost()
	if err != nil {
		table = 65536 // the kernel's file is there once it tracks anything
	}
	return uint32(min(max(table/2/uint64(max(1, agents))/uint64(guests), minConnections), maxConnections))
}

// trackedAtMost returns how many connections this machine tracks at most. Until
// something makes the kernel track, it does not say. Tests replace it.
var trackedAtMost = func() (uint64, error) {
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32)
}

// A rule is what a packet must match and what then happens to it.
type rule []expr.Any

func when(parts ...rule) rule {
	var all rule
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func cmp(op expr.CmpOp, data []byte) expr.Any {
	return &expr.Cmp{Op: op, Register: 1, Data: data}
}

func ifname(key expr.MetaKey, name string) rule {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return rule{&expr.Meta{Key: key, Register: 1}, cmp(expr.CmpOpEq, padded)}
}

func in(name string) rule  { return ifname(expr.MetaKeyIIFNAME, name) }
func out(name string) rule { return ifname(expr.MetaKeyOIFNAME, name) }

func inGroup(g uint32) rule {
	return rule{&expr.Meta{Key: expr.MetaKeyIIFGROUP, Register: 1}, cmp(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(g))}
}

func outGroup(op expr.CmpOp, g uint32) rule {
	return rule{&expr.Meta{Key: expr.MetaKeyOIFGROUP, Register: 1}, cmp(op, binaryutil.NativeEndian.PutUint32(g))}
}

// byUser matches packets of a socket that a user's process made.
func byUser(uid uint32) rule {
	return rule{&expr.Meta{Key: expr.MetaKeySKUID, Register: 1}, cmp(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(uid))}
}

func family(op expr.CmpOp, proto byte) rule {
	return rule{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, cmp(op, []byte{proto})}
}

// ip loads an address field of an IPv4 header and compares it.
func ip(offset uint32, op expr.CmpOp, p netip.Prefix) rule {
	r := when(family(expr.CmpOpEq, unix.NFPROTO_IPV4), rule{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
	})
	if p.Bits() < 32 {
		mask := binary.BigEndian.AppendUint32(nil, ^uint32(0)<<(32-p.Bits()))
		r = append(r, &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)})
	}
	return append(r, cmp(op, p.Masked().Addr().AsSlice()))
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func from(p netip.Prefix) rule    { return ip(12, expr.CmpOpEq, p) }
func notFrom(p netip.Prefix) rule { return ip(12, expr.CmpOpNeq, p) }
func to(a netip.Addr) rule        { return ip(16, expr.CmpOpEq, host(a)) }

// linkIn matches a link's name, which key loads, that is in a set.
func linkIn(key expr.MetaKey, s *nftables.Set) rule {
	return rule{&expr.Meta{Key: key, Register: 1}, &expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID}}
}

func toAny(s *nftables.Set) rule {
	return when(family(expr.CmpOpEq, unix.NFPROTO_IPV4), rule{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID},
	})
}

func protocol(p byte) rule {
	return rule{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, cmp(expr.CmpOpEq, []byte{p})}
}

func port(proto byte, port uint16) rule {
	return when(protocol(proto), rule{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		cmp(expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, port)),
	})
}

func fromPort(port uint16) rule {
	return rule{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
		cmp(expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, port)),
	}
}

func ctBits(key expr.CtKey, bits uint32) rule {
	return rule{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		cmp(expr.CmpOpNeq, make([]byte, 4)),
	}
}

func state(bits uint32) rule { return ctBits(expr.CtKeySTATE, bits) }

// dnatted matches connections whose destination a rule of ours has changed.
func dnatted() rule { return ctBits(expr.CtKeySTATUS, 1<<5 /* IPS_DST_NAT */) }

func over(connections uint32) rule {
	return rule{&expr.Connlimit{Count: connections, Flags: expr.NFT_CONNLIMIT_F_INV}}
}

func perSecond(n uint64) rule {
	return rule{&expr.Limit{Type: expr.LimitTypePkts, Rate: n, Unit: expr.LimitTimeSecond, Burst: uint32(n)}}
}

// faster matches what comes faster than rate, after a burst of atOnce. Each rule has
// its own bucket.
func faster(kind expr.LimitType, rate, atOnce int64) rule {
	const most = 1<<32 - 1
	return rule{&expr.Limit{Type: kind, Rate: uint64(rate), Unit: expr.LimitTimeSecond, Burst: uint32(min(atOnce, most)), Over: true}}
}

// limits returns the rules that drop a guest's packets, in each direction, above its rates.
func limits(r rates.Rates) []rule {
	var all []rule
	for _, way := range []rule{in(tapName), in(vethName)} {
		if r.NetPackets > 0 {
			all = append(all, when(way, faster(expr.LimitTypePkts, r.NetPackets, r.AtOnce(r.NetPackets)), drop))
		}
		if r.NetBytes > 0 {
			// The kernel adds what comes in a second to a burst of bytes.
			atOnce := max(r.AtOnce(r.NetBytes), largestPacket) - r.NetBytes
			all = append(all, when(way, faster(expr.LimitTypePktBytes, r.NetBytes, max(atOnce, 0)), drop))
		}
	}
	return all
}

// turn is true for one of n packets in a row, each i another.
func turn(i, n int) rule {
	return rule{
		&expr.Numgen{Register: 1, Modulus: uint32(n), Type: unix.NFT_NG_INCREMENTAL},
		cmp(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(uint32(i))),
	}
}

var (
	accept = rule{&expr.Verdict{Kind: expr.VerdictAccept}}
	drop   = rule{&expr.Verdict{Kind: expr.VerdictDrop}}
	// reject answers "administratively prohibited": the guest's program fails
	// at once and does not wait.
	reject     = rule{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
	masquerade = rule{&expr.Masq{}}

	// clampMSS lets no side of a TCP connection count on larger packets than the
	// path beyond the host takes.
	clampMSS = when(protocol(unix.IPPROTO_TCP), rule{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x06}, Xor: []byte{0}},
		cmp(expr.CmpOpEq, []byte{0x02}), // SYN, not RST
		&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
		&expr.Exthdr{SourceRegister: 1, Type: 2, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
	})

	established = state(expr.CtStateBitESTABLISHED)
	// related lets errors about a connection through, and nothing that some
	// protocol's helper expects.
	related = when(protocol(unix.IPPROTO_ICMP), state(expr.CtStateBitRELATED))
	invalid = state(expr.CtStateBitINVALID)
)

func dnat(a netip.Addr) rule {
	return rule{
		&expr.Immediate{Register: 1, Data: a.AsSlice()},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}
}

// A ruleset writes one table in one transaction: the old one stays in force
// until all of the new one is.
type ruleset struct {
	conn  *nftables.Conn
	table *nftables.Table
	err   error
}

// newRuleset writes a table of the calling thread's namespace; with fresh, the
// caller knows that there is none of that name, which saves the kernel a wait
// of some 10 ms for the packets that might still see the old one.
func newRuleset(table string, fresh bool) (*ruleset, error) {
	conn, err := nftables.New(nftables.WithSockOptions(func(c *mdnetlink.Conn) error {
		// The kernel answers at once; a wait without end would be a bug's.
		return c.SetDeadline(time.Now().Add(nftTimeout))
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	t := &nftables.Table{Name: table, Family: nftables.TableFamilyINet}
	if !fresh {
		conn.AddTable(t)
		conn.DelTable(t)
	}
	conn.AddTable(t)
	return &ruleset{conn: conn, table: t}, nil
}

func (r *ruleset) chain(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority, policy nftables.ChainPolicy, rules ...rule) {
	c := r.conn.AddChain(&nftables.Chain{Name: name, Table: r.table, Type: kind, Hooknum: hook, Priority: priority, Policy: &policy})
	for _, exprs := range rules {
		r.conn.AddRule(&nftables.Rule{Table: r.table, Chain: c, Exprs: exprs})
	}
}

func (r *ruleset) closedSet() *nftables.Set {
	// The ID is the transaction's alone.
	s := &nftables.Set{Table: r.table, ID: 1, Name: "closed", Interval: true, Constant: true, KeyType: nftables.TypeIPAddr}
	var elements []nftables.SetElement
	for _, p := range netaddr.Closed() {
		start := binary.BigEndian.Uint32(p.Addr().AsSlice())
		elements = append(elements, nftables.SetElement{Key: p.Addr().AsSlice()})
		if end := uint64(start) + 1<<(32-p.Bits()); end < 1<<32 {
			elements = append(elements, nftables.SetElement{Key: binary.BigEndian.AppendUint32(nil, uint32(end)), IntervalEnd: true})
		}
	}
	if err := r.conn.AddSet(s, elements); err != nil && r.err == nil {
		r.err = fmt.Errorf("add set of closed networks: %w", err)
	}
	return s
}

// linkSet is a set of links' names.
func (r *ruleset) linkSet(names []string) *nftables.Set {
	s := &nftables.Set{Table: r.table, ID: 2, Name: "others", Constant: true, KeyType: nftables.TypeIFName}
	var elements []nftables.SetElement
	for _, name := range names {
		key := make([]byte, unix.IFNAMSIZ)
		copy(key, name)
		elements = append(elements, nftables.SetElement{Key: key})
	}
	if err := r.conn.AddSet(s, elements); err != nil && r.err == nil {
		r.err = fmt.Errorf("add set of other links: %w", err)
	}
	return s
}

func (r *ruleset) commit() error {
	if r.err != nil {
		return r.err
	}
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("write nftables table %s: %w", r.table.Name, err)
	}
	return nil
}

// hostTable is the name of a block's table on the host.
func hostTable(block int) string {
	if block == 0 {
		return "wrenn"
	}
	return fmt.Sprintf("wrenn-%d", block)
}

// hostRules closes the host to a block's guests, and the guests to everything
// but the host's root. The block's interfaces are known by their group, which each
// has from its first moment.
func hostRules(block int, upstreams []netip.Addr) error {
	r, err := newRuleset(hostTable(block), false)
	if err != nil {
		return err
	}
	group, ours := linkGroup(block), blockPrefix(block)
	closedNets := r.closedSet()

	// This machine forwards for guests alone where it forwarded for nobody before.
	var forward []rule
	links, err := linksBefore()
	if err != nil {
		return err
	}
	if len(links) > 0 {
		others := r.linkSet(links)
		forward = append(forward, when(linkIn(expr.MetaKeyIIFNAME, others), linkIn(expr.MetaKeyOIFNAME, others), drop))
	}
	forward = append(forward,
		when(inGroup(group), clampMSS),
		when(outGroup(expr.CmpOpEq, group), clampMSS),
		when(inGroup(group), family(expr.CmpOpNeq, unix.NFPROTO_IPV4), drop),
		when(inGroup(group), notFrom(ours), drop),
		when(inGroup(group), outGroup(expr.CmpOpEq, group), drop),
		when(inGroup(group), invalid, drop),
		when(inGroup(group), established, accept),
		when(inGroup(group), related, accept),
	)
	for _, u := range upstreams {
		forward = append(forward,
			when(inGroup(group), to(u), port(unix.IPPROTO_UDP, 53), accept),
			when(inGroup(group), to(u), port(unix.IPPROTO_TCP, 53), accept),
		)
	}
	forward = append(forward,
		when(inGroup(group), toAny(closedNets), drop),
		when(inGroup(group), accept),
		when(outGroup(expr.CmpOpEq, group), established, accept),
		when(outGroup(expr.CmpOpEq, group), related, accept),
		when(outGroup(expr.CmpOpEq, group), drop),
	)
	r.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept, forward...)
	r.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept,
		when(inGroup(group), family(expr.CmpOpNeq, unix.NFPROTO_IPV4), drop),
		when(inGroup(group), established, accept),
		when(inGroup(group), related, accept),
		when(inGroup(group), drop),
	)
	// The agent runs as root. Other users of the machine reach guests' ports as clients
	// do, through the proxy. Some packets of a connection have no socket, and so no user.
	r.chain("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept,
		when(outGroup(expr.CmpOpEq, group), protocol(unix.IPPROTO_TCP), established, accept),
		when(outGroup(expr.CmpOpEq, group), related, accept),
		when(outGroup(expr.CmpOpEq, group), byUser(0), accept),
		when(outGroup(expr.CmpOpEq, group), reject),
	)
	r.chain(probeChain, nftables.ChainTypeFilter, nftables.ChainHookPostrouting, nftables.ChainPriorityMangle, nftables.ChainPolicyAccept,
		when(from(ours), protocol(unix.IPPROTO_UDP), fromPort(probePort), rule{&expr.Counter{}}, drop),
	)
	r.chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept,
		when(from(ours), outGroup(expr.CmpOpNeq, group), masquerade),
	)
	return r.commit()
}

// removeHostRules removes a block's table, if it is there.
func removeHostRules(block int) error {
	r, err := newRuleset(hostTable(block), false)
	if err != nil {
		return err
	}
	r.conn.DelTable(r.table)
	return r.commit()
}

// slotConfig is what the rules of slots depend on.
type slotConfig struct {
	upstreams   []netip.Addr
	connections uint32 // how many a guest may have tracked at once
	rates       rates.Rates
}

// slotRules are the rules inside a slot's namespace, the calling thread's. The
// same networks are closed here as on the host, so that a guest stays shut in
// while someone reloads the host's firewall.
func slotRules(outside netip.Addr, c slotConfig, fresh bool) error {
	upstreams, connections := c.upstreams, c.connections
	r, err := newRuleset("wrenn", fresh)
	if err != nil {
		return err
	}
	closedNets := r.closedSet()

	// Before the kernel does more with a packet, such as to track its connection.
	r.chain("raw", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept,
		append(limits(c.rates),
			when(family(expr.CmpOpNeq, unix.NFPROTO_IPV4), drop),
			when(in(tapName), notFrom(host(guestAddr)), drop),
		)...)

	prerouting := []rule{when(in(vethName), to(outside), dnat(guestAddr))}
	for i, u := range upstreams {
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			query := when(in(tapName), to(gatewayAddr), port(proto, 53))
			if left := len(upstreams) - i; left > 1 {
				query = when(query, turn(0, left))
			}
			prerouting = append(prerouting, when(query, dnat(u)))
		}
	}
	r.chain("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, nftables.ChainPolicyAccept, prerouting...)

	forward := []rule{
		when(invalid, drop),
		when(established, accept),
		when(related, accept),
		when(in(vethName), out(tapName), dnatted(), accept),
		when(in(tapName), over(connections), drop),
	}
	for _, u := range upstreams {
		forward = append(forward,
			when(in(tapName), to(u), port(unix.IPPROTO_UDP, 53), accept),
			when(in(tapName), to(u), port(unix.IPPROTO_TCP, 53), accept),
		)
	}
	forward = append(forward,
		when(in(tapName), toAny(closedNets), reject),
		when(in(tapName), out(vethName), accept),
	)
	r.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop, forward...)

	r.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop,
		when(in("lo"), accept),
		when(in(tapName), to(gatewayAddr), port(unix.IPPROTO_UDP, 123), perSecond(ntpPerSecond), accept),
		when(in(tapName), to(gatewayAddr), port(unix.IPPROTO_UDP, 123), drop),
		when(invalid, drop),
		when(established, accept),
		when(related, accept),
		when(in(tapName), over(connections), drop),
		when(in(tapName), to(metadataAddr), port(unix.IPPROTO_TCP, 80), accept),
		when(in(tapName), reject),
	)

	r.chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept,
		when(out(vethName), masquerade),
		// The guest sees every caller as its gateway, in whatever slot it wakes.
		when(out(tapName), masquerade),
	)
	return r.commit()
}
