package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/flock"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

const (
	blocks     = 64  // maximum number of agents on a machine
	blockSlots = 512 // slots of each agent
)

// ErrNoBlock means that this machine already has as many agents as the address plan allows.
var ErrNoBlock = errors.New("every block of network slots is taken")

// A block is one agent's share of the machine's slot indexes. The agent locks its file
// while it runs, and leaves the file if VMs keep running.
type block struct {
	number int
	lock   *os.File
	dir    layout.Dir
	left   bool // guarded by lockBlocks
}

func blockFile(n int) string { return filepath.Join(layout.NetworkBlocks(), strconv.Itoa(n)) }

// lockBlocks keeps other agents from taking and leaving blocks until the result is closed.
func lockBlocks() (*os.File, error) {
	if err := os.MkdirAll(layout.NetworkBlocks(), 0o755); err != nil {
		return nil, fmt.Errorf("make folder of blocks: %w", err)
	}
	d, err := flock.Lock(context.Background(), layout.NetworkBlocks()) // others hold it for a few system calls only
	if err != nil {
		return nil, fmt.Errorf("lock folder of blocks: %w", err)
	}
	return d, nil
}

// takeBlock takes a block for dir: preferably that of most slots in keep, otherwise the one
// that dir had before, otherwise a free one. Slots in keep of other blocks are not an error
// here; they are just not the pool's.
func takeBlock(dir layout.Dir, keep []int) (*block, error) {
	all, err := lockBlocks()
	if err != nil {
		return nil, err
	}
	defer all.Close()
	if err := shareNamespaces(); err != nil {
		return nil, err
	}

	before := blocksOf(keep)
	if n, ok := remembered(dir); ok && (inUse(n) || !conflicts(n, takenNetworks())) {
		before = append(before, n)
	}
	for _, n := range before {
		b, owner, err := lockBlock(dir, n)
		switch {
		case err == nil && (owner == "" || owner == dir || abandoned(owner, n)):
			return b.claimed()
		case err == nil:
			b.lock.Close()
		case owner == dir:
			return nil, fmt.Errorf("another agent already runs on %s: %w", dir, err)
		case !errors.Is(err, flock.ErrLocked):
			return nil, err
		}
	}
	for _, n := range candidates() {
		b, owner, err := lockBlock(dir, n)
		if errors.Is(err, flock.ErrLocked) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if owner != "" && owner != dir && !abandoned(owner, n) {
			b.lock.Close()
			continue
		}
		return b.claimed()
	}
	return nil, ErrNoBlock
}

// blocksOf returns the blocks of slots, sorted by descending number of slots. It ignores
// invalid slots.
func blocksOf(slots []int) []int {
	count := map[int]int{}
	for _, i := range slots {
		if i >= 0 && i < blocks*blockSlots {
			count[i/blockSlots]++
		}
	}
	return slices.SortedFunc(maps.Keys(count), func(a, b int) int {
		if count[a] != count[b] {
			return count[b] - count[a]
		}
		return a - b
	})
}

// candidates returns the blocks in the order to try them: first those that were in use,
// because an abandoned one needs a cleanup, and last those whose addresses conflict with
// other networks of this machine.
func candidates() []int {
	var used, clear, conflicting []int
	nets := takenNetworks()
	for n := range blocks {
		if inUse(n) {
			used = append(used, n)
		} else if conflicts(n, nets) {
			conflicting = append(conflicting, n)
		} else {
			clear = append(clear, n)
		}
	}
	return slices.Concat(used, clear, conflicting)
}

// inUse reports whether an agent has block n, or left VMs in it.
func inUse(n int) bool {
	_, err := os.Stat(blockFile(n))
	return err == nil
}

// agents returns the number of agents that have a block of this machine or left guests in
// one.
func agents() (n int) {
	for b := range blocks {
		owner, err := os.ReadFile(blockFile(b))
		if err == nil && !abandoned(layout.Dir(strings.TrimSuffix(string(owner), "\n")), b) {
			n++
		}
	}
	return n
}

// conflicts reports whether block n overlaps one of nets.
func conflicts(n int, nets []netip.Prefix) bool {
	return slices.ContainsFunc(nets, blockPrefix(n).Overlaps)
}

// takenNetworks returns the networks in which this machine has an address. It leaves out
// /31s, which are slots', and networks larger than a /16, which are whole address plans.
func takenNetworks() []netip.Prefix {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var nets []netip.Prefix
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && p.Bits() >= 16 && p.Bits() != 31 {
			nets = append(nets, p.Masked())
		}
	}
	return nets
}

// lockBlock locks block n. owner is the data directory of the agent that has it or had it
// last, even after an error.
func lockBlock(dir layout.Dir, n int) (_ *block, owner layout.Dir, _ error) {
	f, err := flock.TryLock(blockFile(n))
	if text, err := os.ReadFile(blockFile(n)); err == nil {
		owner = layout.Dir(strings.TrimSuffix(string(text), "\n"))
	}
	if err != nil {
		return nil, owner, fmt.Errorf("take block %d: %w", n, err)
	}
	return &block{number: n, lock: f, dir: dir}, owner, nil
}

// remembered returns the block that dir's agent had last.
func remembered(dir layout.Dir) (int, bool) {
	text, err := os.ReadFile(dir.NetworkBlock())
	if err != nil {
		return 0, false
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	return n, err == nil && n >= 0 && n < blocks
}

// abandoned reports whether owner's agent has since taken another block than n, or owner
// is gone.
func abandoned(owner layout.Dir, n int) bool {
	m, ok := remembered(owner)
	return !ok || m != n
}

// claim records in the block's file and in dir that the block is dir's. It skips what is
// recorded already, so that an agent gets its block back even if the disk is full.
func (b *block) claim() error {
	owner := []byte(string(b.dir) + "\n")
	have, err := os.ReadFile(blockFile(b.number))
	if err != nil || !bytes.Equal(have, owner) {
		if err = b.lock.Truncate(0); err == nil {
			_, err = b.lock.WriteAt(owner, 0)
		}
	}
	if n, ok := remembered(b.dir); err == nil && ok && n == b.number {
		return nil
	}
	if err == nil {
		err = os.MkdirAll(b.dir.Run(), 0o755)
	}
	if err == nil {
		// No sync: after a power failure there are no slots.
		err = atomicfile.WriteNoSync(b.dir.NetworkBlock(), []byte(strconv.Itoa(b.number)+"\n"), 0o644)
	}
	if err != nil {
		return fmt.Errorf("claim block %d: %w", b.number, err)
	}
	return nil
}

// claimed claims a block that was just locked. After an error, it unlocks it.
func (b *block) claimed() (*block, error) {
	if err := b.claim(); err != nil {
		b.lock.Close()
		return nil, err
	}
	return b, nil
}

// restore makes the block's files again if somebody removed them. lost reports whether
// somebody did. The caller holds lockBlocks.
func (b *block) restore() (lost bool, err error) {
	held, err := b.lock.Stat()
	if err != nil {
		return false, err
	}
	if there, err := os.Stat(blockFile(b.number)); err == nil && os.SameFile(held, there) {
		if n, ok := remembered(b.dir); ok && n == b.number {
			return false, nil
		}
		return true, b.claim()
	}
	again, owner, err := lockBlock(b.dir, b.number)
	if err != nil {
		return true, err
	}
	if owner != "" && owner != b.dir {
		again.lock.Close()
		return true, fmt.Errorf("the block now belongs to %s", owner)
	}
	old := b.lock
	b.lock = again.lock
	old.Close()
	return true, b.claim()
}

// leave unlocks the block. Unless kept is set, it also frees it for other agents. Either
// way, dir remembers the block, so that its next agent prefers it.
func (b *block) leave(kept bool) error {
	all, err := lockBlocks()
	if err != nil {
		return err
	}
	defer all.Close()
	b.left = true
	if !kept {
		err = errors.Join(
			ignore(os.Remove(blockFile(b.number)), os.ErrNotExist),
			leaveMachine(),
		)
	}
	return errors.Join(err, b.lock.Close())
}

func ignore(err, target error) error {
	if errors.Is(err, target) {
		return nil
	}
	return err
}

const ipForward = "net/ipv4/ip_forward"

// enableForwarding turns on IPv4 forwarding, and reports whether it was off. It uses the
// machine-wide switch, because replies may come in on any interface. noteForwarding must
// have recorded the earlier state.
func enableForwarding() (changed bool, err error) {
	all, err := lockBlocks()
	if err != nil {
		return false, err
	}
	defer all.Close()
	now, err := os.ReadFile("/proc/sys/" + ipForward)
	if err != nil {
		return false, fmt.Errorf("read %s: %w", ipForward, err)
	}
	if strings.TrimSpace(string(now)) != "0" {
		return false, nil
	}
	return true, sysctl(ipForward, "1")
}

// noteForwarding records the links of a machine that does not forward IPv4, because it must
// not forward between them later either. Of links that appear later, it adds only those for
// which [outward] returns true. h is a handle of the host's namespace.
func noteForwarding(h *netlink.Handle) error {
	all, err := lockBlocks()
	if err != nil {
		return err
	}
	defer all.Close()
	now, err := os.ReadFile("/proc/sys/" + ipForward)
	if err != nil {
		return fmt.Errorf("read %s: %w", ipForward, err)
	}
	_, missing := os.Stat(layout.Forwarding())
	recorded := missing == nil
	if !recorded && strings.TrimSpace(string(now)) != "0" {
		return nil
	}
	names, err := linksBefore()
	if err != nil {
		return err
	}
	links, err := listLinks(h)
	if err != nil {
		return err
	}
	known := len(names)
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback == 0 && !strings.HasPrefix(a.Name, linkPrefix) && !slices.Contains(names, a.Name) && (!recorded || outward(l)) {
			names = append(names, a.Name)
		}
	}
	if recorded && len(names) == known {
		return nil
	}
	return writeLinksBefore(names)
}

// outward reports whether a link is hardware, is made from hardware, or is a VPN. Links of
// other kinds, such as bridges and veths, are made by software that forwards between them
// and others, such as container engines.
func outward(l netlink.Link) bool {
	switch l := l.(type) {
	case *netlink.Device, *netlink.Vlan, *netlink.Bond, *netlink.Wireguard:
		return true
	case *netlink.Tuntap:
		return l.Mode == netlink.TUNTAP_MODE_TUN
	}
	return l.Type() == "ppp"
}

func writeLinksBefore(names []string) error {
	if err := atomicfile.Write(layout.Forwarding(), []byte(strings.Join(names, "\n")), 0o644); err != nil {
		return fmt.Errorf("record that forwarding was off: %w", err)
	}
	return nil
}

// linksBefore returns the links that noteForwarding recorded, or none if this machine
// forwarded IPv4 before.
func linksBefore() ([]string, error) {
	b, err := os.ReadFile(layout.Forwarding())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read earlier links: %w", err)
	}
	return strings.Fields(string(b)), nil
}

// leaveMachine undoes what agents do to the whole machine, unless a block is still in use.
// The caller holds lockBlocks.
func leaveMachine() error {
	others, err := os.ReadDir(layout.NetworkBlocks())
	if err != nil || len(others) > 0 {
		return err
	}
	err = unshareNamespaces()
	if removed := os.Remove(layout.Forwarding()); removed == nil {
		err = errors.Join(err, sysctl(ipForward, "0"))
	} else {
		err = errors.Join(err, ignore(removed, os.ErrNotExist))
	}
	return err
}

// sysctl sets a kernel parameter in the calling thread's namespace.
func sysctl(name, value string) error {
	f, err := os.OpenFile("/proc/sys/"+name, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set %s: %w", name, err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("set %s to %s: %w", name, value, err)
	}
	return nil
}
