// Package ports publishes services that listen only on the guest's loopback at the guest's
// address. It looks for their sockets when the kernel reports that a socket began or ceased
// to listen, and on request, and starts a bridge for each.
package ports

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// interval is how often Run looks for sockets if the kernel reports no events. It costs
	// reading two small files.
	interval = time.Second
	// scanDelay is the time between an event and the scan. The kernel lists a socket only
	// after the event, and a program may open several at once.
	scanDelay = 10 * time.Millisecond
	// lateDelay is the time between that scan and another. A busy host may stop the
	// processor that opens a socket between the event and the listing.
	lateDelay = 250 * time.Millisecond
	// rest bounds the time that scans because of events take: after a scan, at least rest
	// times as long passes before the next one.
	rest = 10
)

// listener is one listening TCP socket.
type listener struct {
	inode uint64
	addr  netip.AddrPort
}

// parse returns the listening sockets in /proc/net/tcp or tcp6. It skips malformed lines.
func parse(r io.Reader) ([]listener, error) {
	var found []listener
	s := bufio.NewScanner(r)
	for s.Scan() {
		// sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode …
		f := strings.Fields(s.Text())
		if len(f) < 10 || f[3] != "0A" {
			continue
		}
		addr, ok := parseAddr(f[1])
		if !ok {
			continue
		}
		inode, err := strconv.ParseUint(f[9], 10, 64)
		if err != nil {
			continue
		}
		found = append(found, listener{inode, addr})
	}
	return found, s.Err()
}

// parseAddr parses an address such as "0100007F:1F90": 32-bit words in the machine's byte
// order, which is little-endian wherever Wrenn runs, and the port.
func parseAddr(s string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(s, ":")
	if !ok || (len(host) != 8 && len(host) != 32) {
		return netip.AddrPort{}, false
	}
	p, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	b, err := hex.DecodeString(host)
	if err != nil {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.BigEndian.PutUint32(b[i:], binary.LittleEndian.Uint32(b[i:]))
	}
	addr, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(addr.Unmap(), uint16(p)), true
}

// Config configures a forwarder.
type Config struct {
	Address netip.Addr // on which bridges listen: the guest's own
	Except  []uint16   // ports that are never bridged: the daemon's own
	Log     *slog.Logger
	// Tracefs is where that file system is mounted. Empty: there are no events.
	Tracefs string
	// Files list the sockets (/proc/net/tcp and /proc/net/tcp6).
	Files []string
}

// Forwarder bridges ports.
type Forwarder struct {
	cfg  Config
	look chan chan<- struct{}
	list func() ([]listener, error)

	mu      sync.RWMutex
	byNode  map[uint64]*forward // by the inode of the socket behind the bridge
	open    map[uint16]bool     // the ports at the guest's address where a server or a bridge listens
	scanned chan struct{}       // closed at the end of the next scan
}

// forward is a bridge, or one that could not be started, which is not retried at once.
type forward struct {
	target netip.AddrPort
	bridge *bridge
	retry  time.Time
	// reached is set if the socket itself accepts connections to the guest's address.
	reached bool
}

// New returns a forwarder, which works while Run runs.
func New(cfg Config) *Forwarder {
	if len(cfg.Files) == 0 {
		cfg.Files = []string{"/proc/net/tcp", "/proc/net/tcp6"}
	}
	f := &Forwarder{cfg: cfg, look: make(chan chan<- struct{}), byNode: map[uint64]*forward{}, scanned: make(chan struct{})}
	f.list = f.listeners
	return f
}

// Forwarded lists the sockets that have a bridge.
func (f *Forwarder) Forwarded() []netip.AddrPort {
	f.mu.RLock()
	defer f.mu.RUnlock()
	var l []netip.AddrPort
	for _, fw := range f.byNode {
		if fw.bridge != nil {
			l = append(l, fw.target)
		}
	}
	return l
}

// Run maintains the bridges until ctx is done, and then stops them.
func (f *Forwarder) Run(ctx context.Context) {
	defer f.stop()
	pause := interval
	var changed <-chan struct{}
	if f.cfg.Tracefs != "" {
		e, err := newEvents(f.cfg.Tracefs)
		if err != nil {
			f.cfg.Log.Warn("the kernel does not report new listening ports", "error", err)
		} else {
			defer e.Close()
			changed, pause = e.C, retryAfter
		}
	}
	f.follow(ctx, changed, pause)
}

// follow scans at intervals of pause, twice after each value of changed, and on request.
func (f *Forwarder) follow(ctx context.Context, changed <-chan struct{}, pause time.Duration) {
	var rested time.Time // when enough time has passed since the last scan
	scan := func() {
		begun := time.Now()
		f.scan()
		rested = time.Now().Add(rest * time.Since(begun))
	}
	within := func(d time.Duration) time.Duration { return max(d, time.Until(rested)) }
	scan()
	next := time.NewTimer(pause)
	defer next.Stop()
	due := false // whether the next scan is the first one after an event
	for {
		events := changed
		if due {
			events = nil // An event that comes now needs a scan of its own.
		}
		select {
		case <-ctx.Done():
			return
		case <-events:
			due = true
			next.Reset(within(scanDelay))
		case <-next.C:
			scan()
			if due {
				next.Reset(within(lateDelay))
			} else {
				next.Reset(pause)
			}
			due = false
		case done := <-f.look:
			scan()
			close(done)
		}
	}
}

// Look makes Run look for sockets at once, and returns whether a server is reachable at
// port of the guest's address. If not, Look waits for one until ctx is done.
func (f *Forwarder) Look(ctx context.Context, port uint16) bool {
	done := make(chan struct{})
	select {
	case f.look <- done:
		<-done
	case <-ctx.Done():
		return false
	}
	for {
		f.mu.RLock()
		open, scanned := f.open[port], f.scanned
		f.mu.RUnlock()
		if open {
			return true
		}
		select {
		case <-scanned:
		case <-ctx.Done():
			return false
		}
	}
}

func (f *Forwarder) stop() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for inode, fw := range f.byNode {
		if fw.bridge != nil {
			fw.bridge.Stop()
		}
		delete(f.byNode, inode)
	}
}

// scan reads the sockets once, and starts and stops bridges accordingly.
func (f *Forwarder) scan() {
	all, err := f.list()
	if err != nil {
		f.cfg.Log.Warn("find listening ports", "error", err)
		return
	}
	f.apply(wanted(all, f.cfg.Except))
}

// listeners returns the sockets that listen.
func (f *Forwarder) listeners() ([]listener, error) {
	var all []listener
	for _, name := range f.cfg.Files {
		file, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // no IPv6
		}
		if err != nil {
			return nil, err
		}
		l, err := parse(file)
		file.Close()
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		all = append(all, l...)
	}
	return all, nil
}

// wanted returns the sockets that need a bridge: one for each port with a listener on
// loopback (IPv4 is preferred) and none at the guest's address. A socket that listens at
// every IPv6 address comes first, because it may also accept IPv4, which the table does
// not tell. reached has the ports that need none.
func wanted(all []listener, except []uint16) (want map[uint64]netip.AddrPort, reached map[uint16]bool) {
	loopback := map[uint16]listener{}
	every6 := map[uint16]listener{}
	reached = map[uint16]bool{}
	for _, p := range except {
		reached[p] = true
	}
	for _, l := range all {
		a, port := l.addr.Addr(), l.addr.Port()
		switch {
		case a.IsUnspecified() && a.Is6():
			if before, ok := every6[port]; !ok || better(l, before) {
				every6[port] = l
			}
		case a.IsUnspecified():
			reached[port] = true
		case a.IsLoopback():
			if before, ok := loopback[port]; !ok || better(l, before) {
				loopback[port] = l
			}
		}
	}
	want = map[uint64]netip.AddrPort{}
	maps.Copy(loopback, every6)
	for port, l := range loopback {
		if port != 0 && !reached[port] {
			want[l.inode] = l.addr
		}
	}
	return want, reached
}

// better orders the sockets of one port. The order must be stable, unlike the kernel's, so
// that bridges do not change.
func better(a, b listener) bool {
	x, y := a.addr.Addr(), b.addr.Addr()
	if x.Is4() != y.Is4() {
		return x.Is4()
	}
	if x != y {
		return x.Less(y)
	}
	return a.inode < b.inode
}

// retryAfter is the time until a failed bridge is started again.
const retryAfter = 10 * time.Second

// apply starts the bridges that are wanted, and stops the others. It adds the ports that
// are reachable because of them to reached.
func (f *Forwarder) apply(want map[uint64]netip.AddrPort, reached map[uint16]bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for inode, fw := range f.byNode {
		if want[inode] == fw.target {
			continue
		}
		if fw.bridge != nil {
			fw.bridge.Stop()
		}
		delete(f.byNode, inode)
	}
	for inode, target := range want {
		fw := f.byNode[inode]
		if fw == nil || fw.bridge == nil && !fw.reached && !time.Now().Before(fw.retry) {
			fw = f.start(target)
			f.byNode[inode] = fw
		}
		if fw.bridge != nil || fw.reached {
			reached[target.Port()] = true
		}
	}
	f.open = reached
	close(f.scanned)
	f.scanned = make(chan struct{})
}

// start starts a bridge to target, unless target itself is reachable.
func (f *Forwarder) start(target netip.AddrPort) *forward {
	if target.Addr().IsUnspecified() && taken(netip.AddrPortFrom(f.cfg.Address, target.Port())) {
		return &forward{target: target, reached: true}
	}
	b, err := newBridge(f.cfg.Address, loopbackOf(target), f.cfg.Log)
	if err != nil {
		// Probably another socket has the port at the guest's address.
		f.cfg.Log.Warn("start bridge", "target", target, "error", err)
		return &forward{target: target, retry: time.Now().Add(retryAfter)}
	}
	return &forward{target: target, bridge: b}
}

// loopbackOf returns the address at which a bridge reaches a socket.
func loopbackOf(target netip.AddrPort) netip.AddrPort {
	if target.Addr().IsUnspecified() {
		return netip.AddrPortFrom(netip.IPv6Loopback(), target.Port())
	}
	return target
}

// taken reports whether a socket listens at addr, or at every address of its family.
func taken(addr netip.AddrPort) bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	// Closed connections in TIME_WAIT do not count.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return true
	}
	return unix.Bind(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}) != nil
}
