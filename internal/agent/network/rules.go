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

// Limits of one guest's use of the host's kernel and agent.
const (
	maxConnections = 8192 // tracked at once; see shareOfConnections
	minConnections = 32
	ntpPerSecond   = 16
	// largestPacket is the size of the largest packet with offloads, in bytes. A lower burst
	// would never let it pass.
	largestPacket = 64 << 10
)

// probeChain drops packets from probePort (the discard service) and counts them. They show
// whether the host's firewalls let guests' packets pass.
const (
	probePort  = 9
	probeChain = "probe"
)

// nftTimeout bounds one transaction with nftables, which may wait for those of other
// programs.
const nftTimeout = 30 * time.Second

// shareOfConnections returns the number of connections that each of an agent's guests may
// have tracked at once, so that all agents' guests together have at most half of the
// machine's. guests is the maximum number of guests (0: one per slot).
func shareOfConnections(guests, agents int) uint32 {
	if guests <= 0 || guests > blockSlots {
		guests = blockSlots
	}
	table, err := trackedAtMost()
	if err != nil {
		table = 65536 // the kernel does not track yet
	}
	return uint32(min(max(table/2/uint64(max(1, agents))/uint64(guests), minConnections), maxConnections))
}

// trackedAtMost returns the maximum number of connections that this machine tracks. It fails
// until the kernel tracks connections. Tests replace it.
var trackedAtMost = func() (uint64, error) {
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32)
}

// A rule is a list of expressions that match packets and act on them.
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

// byUser matches packets of a user's sockets.
func byUser(uid uint32) rule {
	return rule{&expr.Meta{Key: expr.MetaKeySKUID, Register: 1}, cmp(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(uid))}
}

func family(op expr.CmpOp, proto byte) rule {
	return rule{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, cmp(op, []byte{proto})}
}

// ip compares the address at offset in an IPv4 header with p.
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

// linkIn matches if the link that key loads is in the set.
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

// dnatted matches connections whose destination address was translated.
func dnatted() rule { return ctBits(expr.CtKeySTATUS, 1<<5 /* IPS_DST_NAT */) }

func over(connections uint32) rule {
	return rule{&expr.Connlimit{Count: connections, Flags: expr.NFT_CONNLIMIT_F_INV}}
}

func perSecond(n uint64) rule {
	return rule{&expr.Limit{Type: expr.LimitTypePkts, Rate: n, Unit: expr.LimitTimeSecond, Burst: uint32(n)}}
}

// faster matches packets above rate per second, after a burst of atOnce. Each rule has its
// own bucket.
func faster(kind expr.LimitType, rate, atOnce int64) rule {
	const most = 1<<32 - 1
	return rule{&expr.Limit{Type: kind, Rate: uint64(rate), Unit: expr.LimitTimeSecond, Burst: uint32(min(atOnce, most)), Over: true}}
}

// limits returns the rules that drop a guest's packets above its rates, in each direction.
func limits(r rates.Rates) []rule {
	var all []rule
	for _, way := range []rule{in(tapName), in(vethName)} {
		if r.NetPackets > 0 {
			all = append(all, when(way, faster(expr.LimitTypePkts, r.NetPackets, r.AtOnce(r.NetPackets)), drop))
		}
		if r.NetBytes > 0 {
			// The kernel adds the bytes of a second to the burst.
			atOnce := max(r.AtOnce(r.NetBytes), largestPacket) - r.NetBytes
			all = append(all, when(way, faster(expr.LimitTypePktBytes, r.NetBytes, max(atOnce, 0)), drop))
		}
	}
	return all
}

// turn matches every n-th packet: packet i of each n.
func turn(i, n int) rule {
	return rule{
		&expr.Numgen{Register: 1, Modulus: uint32(n), Type: unix.NFT_NG_INCREMENTAL},
		cmp(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(uint32(i))),
	}
}

var (
	accept = rule{&expr.Verdict{Kind: expr.VerdictAccept}}
	drop   = rule{&expr.Verdict{Kind: expr.VerdictDrop}}
	// reject responds "administratively prohibited", so that the guest's program fails at
	// once.
	reject     = rule{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
	masquerade = rule{&expr.Masq{}}

	// clampMSS limits the segment size of TCP connections to what the path beyond the host
	// supports.
	clampMSS = when(protocol(unix.IPPROTO_TCP), rule{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x06}, Xor: []byte{0}},
		cmp(expr.CmpOpEq, []byte{0x02}), // SYN, not RST
		&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
		&expr.Exthdr{SourceRegister: 1, Type: 2, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
	})

	established = state(expr.CtStateBitESTABLISHED)
	// related matches ICMP errors about a connection, but not what protocol helpers expect.
	related = when(protocol(unix.IPPROTO_ICMP), state(expr.CtStateBitRELATED))
	invalid = state(expr.CtStateBitINVALID)
)

func dnat(a netip.Addr) rule {
	return rule{
		&expr.Immediate{Register: 1, Data: a.AsSlice()},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}
}

// A ruleset replaces a table in one transaction, so that the old rules are in force until
// all new ones are.
type ruleset struct {
	conn  *nftables.Conn
	table *nftables.Table
	err   error
}

// newRuleset starts a ruleset in the calling thread's namespace. With fresh, no table of
// that name may exist, which saves the kernel a wait of some 10 ms for packets that still
// use the old one.
func newRuleset(table string, fresh bool) (*ruleset, error) {
	conn, err := nftables.New(nftables.WithSockOptions(func(c *mdnetlink.Conn) error {
		// The kernel responds at once. The deadline guards against bugs.
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
	// The ID matters only in this transaction.
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

// linkSet adds a set of link names.
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

// hostTable returns the name of a block's table on the host.
func hostTable(block int) string {
	if block == 0 {
		return "wrenn"
	}
	return fmt.Sprintf("wrenn-%d", block)
}

// hostRules writes the host's rules for a block: its guests cannot reach the host, and only
// root on the host can reach the guests. The rules match links by group, which a link has
// from its creation on.
func hostRules(block int, upstreams []netip.Addr) error {
	r, err := newRuleset(hostTable(block), false)
	if err != nil {
		return err
	}
	group, ours := linkGroup(block), blockPrefix(block)
	closedNets := r.closedSet()

	// If this machine did not forward before, it must now forward only for guests.
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
	// Only the agent, which is root, reaches guests directly; other local users need the
	// proxy. "established" is for packets of root's connections without a socket.
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

// removeHostRules removes a block's table. It is idempotent.
func removeHostRules(block int) error {
	r, err := newRuleset(hostTable(block), false)
	if err != nil {
		return err
	}
	r.conn.DelTable(r.table)
	return r.commit()
}

// slotConfig configures the rules of a slot.
type slotConfig struct {
	upstreams   []netip.Addr
	connections uint32 // maximum number of tracked connections
	rates       rates.Rates
}

// slotRules writes the rules of a slot to its namespace, the calling thread's. They close
// the same networks as the host's, so that a guest cannot reach them while somebody reloads
// the host's firewall.
func slotRules(outside netip.Addr, c slotConfig, fresh bool) error {
	upstreams, connections := c.upstreams, c.connections
	r, err := newRuleset("wrenn", fresh)
	if err != nil {
		return err
	}
	closedNets := r.closedSet()

	// Before the kernel does any other work for a packet, such as connection tracking.
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
		// The guest sees every client at its gateway's address, whatever slot it is in.
		when(out(tapName), masquerade),
	)
	return r.commit()
}
