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

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/flock"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

const (
	blocks     = 64  // agents that can share a machine
	blockSlots = 512 // slots that each of them has
)

// ErrNoBlock says that as many agents as the address plan has room for
// already run on this machine.
var ErrNoBlock = errors.New("every block of network slots is taken")

// A block is one agent's share of the machine's slot indexes. Its file is
// locked while the agent runs and stays after it while VMs of its do.
type block struct {
	number int
	lock   *os.File
	dir    layout.Dir
	left   bool // under lockBlocks
}

func blockFile(n int) string { return filepath.Join(layout.NetworkBlocks(), strconv.Itoa(n)) }

// lockBlocks excludes every other agent from taking and leaving blocks.
func lockBlocks() (*os.File, error) {
	if err := os.MkdirAll(layout.NetworkBlocks(), 0o755); err != nil {
		return nil, fmt.Errorf("make folder of blocks: %w", err)
	}
	d, err := flock.Lock(context.Background(), layout.NetworkBlocks()) // held for a few system calls
	if err != nil {
		return nil, fmt.Errorf("lock folder of blocks: %w", err)
	}
	return d, nil
}

// takeBlock locks the block that most of keep's slots are of, else the one that
// dir had before, else a free one. What it cannot have keeps no agent from
// starting: the slots of other blocks are just not the pool's.
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

// blocksOf returns the blocks of slots, that with the most of them first. Numbers
// that no slot has are of none.
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

// candidates are the blocks in the order to try them: first those that were
// in use, for if they are abandoned somebody must clean them; last those whose
// addresses this machine has another use for.
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

// inUse reports whether an agent has block n, or had it and left VMs in it.
func inUse(n int) bool {
	_, err := os.Stat(blockFile(n))
	return err == nil
}

// agents returns how many agents have a block of this machine, or left guests in one.
func agents() (n int) {
	for b := range blocks {
		owner, err := os.ReadFile(blockFile(b))
		if err == nil && !abandoned(layout.Dir(strings.TrimSuffix(string(owner), "\n")), b) {
			n++
		}
	}
	return n
}

// conflicts reports whether an address of block n is in one of nets.
func conflicts(n int, nets []netip.Prefix) bool {
	return slices.ContainsFunc(nets, blockPrefix(n).Overlaps)
}

// takenNetworks are the networks that this machine has an address in. Slots'
// own are /31s; larger than a /16 is no neighbour's but a whole address plan.
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

// lockBlock locks block n and says which folder's agent has it or had it last.
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

// remembered is the block that dir's agent had last.
func remembered(dir layout.Dir) (int, bool) {
	text, err := os.ReadFile(dir.NetworkBlock())
	if err != nil {
		return 0, false
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	return n, err == nil && n >= 0 && n < blocks
}

// abandoned says that no agent will come back to block n for owner.
func abandoned(owner layout.Dir, n int) bool {
	m, ok := remembered(owner)
	return !ok || m != n
}

// claim writes down, on both sides, that the block is dir's. It writes nothing that
// is there, so that a full disk keeps no agent from the block that it had.
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
		// After a power failure there is nothing to find again.
		err = atomicfile.WriteNoSync(b.dir.NetworkBlock(), []byte(strconv.Itoa(b.number)+"\n"), 0o644)
	}
	if err != nil {
		return fmt.Errorf("claim block %d: %w", b.number, err)
	}
	return nil
}

// claimed is a block that was just locked, claimed; after an error it is free.
func (b *block) claimed() (*block, error) {
	if err := b.claim(); err != nil {
		b.lock.Close()
		return nil, err
	}
	return b, nil
}

// restore makes the block's files again if somebody removed them, and says
// whether it had to. The caller holds lockBlocks.
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
		return true, fmt.Errorf("it now belongs to %s", owner)
	}
	old := b.lock
	b.lock = again.lock
	old.Close()
	return true, b.claim()
}

// leave gives the block up. A kept one stays its folder's, without a lock. The
// folder remembers either, so that its next agent has nothing to write.
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

// enableForwarding lets this machine forward IPv4, and says whether it did not
// before. Replies come in on whatever interface leads out, which may change at
// any time, so the switch is the machine-wide one; a file remembers that it was
// off.
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

// noteForwarding remembers that this machine forwards nothing, if so, and which
// links it has: between those it is to forward nothing later either. Links that
// other software makes afterwards are that software's business.
func noteForwarding() error {
	all, err := lockBlocks()
	if err != nil {
		return err
	}
	defer all.Close()
	now, err := os.ReadFile("/proc/sys/" + ipForward)
	if err != nil {
		return fmt.Errorf("read %s: %w", ipForward, err)
	}
	if strings.TrimSpace(string(now)) != "0" {
		return nil
	}
	if _, err := os.Stat(layout.Forwarding()); err == nil {
		return nil // Somebody else turned it off since.
	}
	links, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	var names []string
	for _, l := range links {
		if l.Flags&net.FlagLoopback == 0 && !strings.HasPrefix(l.Name, linkPrefix) {
			names = append(names, l.Name)
		}
	}
	return writeLinksBefore(names)
}

func writeLinksBefore(names []string) error {
	if err := atomicfile.Write(layout.Forwarding(), []byte(strings.Join(names, "\n")), 0o644); err != nil {
		return fmt.Errorf("remember that forwarding was off: %w", err)
	}
	return nil
}

// linksBefore returns the links that this machine had when it forwarded nothing;
// none if it did before.
func linksBefore() ([]string, error) {
	b, err := os.ReadFile(layout.Forwarding())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read which links were there before: %w", err)
	}
	return strings.Fields(string(b)), nil
}

// leaveMachine undoes what agents do to the whole machine, if no block is in
// use any more. The caller holds lockBlocks.
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
