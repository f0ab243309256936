package sandbox

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// These tests check the order of events and what failures leave behind. Machines and
// networks are fakes that can fail at any step. A fake machine responds at its slot's
// (loopback) address like the guest daemon. The agent's own tests use real machines.

var errInjected = errors.New("injected failure")

// world is a fake host with its machines and networks. It outlives its managers.
type world struct {
	t   testing.TB
	net byte // second byte of its addresses, see [claimNet]

	mu       sync.Mutex
	rng      *rand.Rand
	failing  map[string]float64 // step → the probability that it fails
	slots    map[int]*worldSlot
	nextSlot int
	vms      map[uuid.UUID]*worldVM
	deaths   map[uuid.UUID]int // by machine id: how often the machine died
	started  int
	responds chan struct{}  // guest daemons respond once it is closed; nil: at once
	warm     int            // how many warm machines a template has
	tracks   bool           // the driver tracks dirty pages
	onStart  func(vmm.Spec) // called when a machine starts, if set
	usual    int            // MiB of memory of most sandboxes; 0: unknown
	boots    time.Duration  // how long a guest may take to boot; 0: [await.Hang]
	rates    rates.Rates    // of each sandbox
	special  rates.Templates
	nested   []Team
	modules  string      // path of the kernel's modules
	format   disk.Format // of machines' disks; nil: qcow2
	version  string      // of the monitor, which restores what the same version or an earlier one saved
}

// count returns how many machines were started.
func (w *world) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.started
}

// nets counts the networks that claimNet has tried. It starts at a random number, so that
// concurrent test processes seldom meet.
var nets = func() *atomic.Uint32 {
	n := new(atomic.Uint32)
	n.Store(rand.Uint32())
	return n
}()

// claimNet returns a second byte of loopback addresses that belongs to this world alone
// until the test ends, across processes. The claim is a listener on an address that no
// slot gets.
func claimNet(t testing.TB) byte {
	t.Helper()
	const first, last = 128, 254
	for range last - first + 1 {
		n := byte(first + nets.Add(1)%(last-first+1))
		l, err := net.Listen("tcp", fmt.Sprintf("127.%d.255.254:%d", n, hostwire.GuestPort))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return n
	}
	t.Fatal("other tests use all networks of loopback addresses")
	return 0
}

func newWorld(t testing.TB, seed uint64) *world {
	w := &world{
		t: t, net: claimNet(t), rng: rand.New(rand.NewPCG(seed, 1)),
		tracks: seed%2 == 0, failing: map[string]float64{}, slots: map[int]*worldSlot{}, vms: map[uuid.UUID]*worldVM{}, deaths: map[uuid.UUID]int{},
	}
	t.Cleanup(func() { // runs before the claim ends
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, vm := range w.vms {
			vm.listener.Close()
		}
	})
	return w
}

func (w *world) fails(step string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rng.Float64() < w.failing[step]
}

func (w *world) setFailing(steps map[string]float64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failing = steps
}

type worldSlot struct {
	w     *world
	index int
	rates rates.Rates // guarded by world.mu
}

func (s *worldSlot) Index() int { return s.index }

func (s *worldSlot) Address() netip.Addr {
	return netip.AddrFrom4([4]byte{127, s.w.net, byte(s.index >> 8), byte(s.index)})
}

func (s *worldSlot) NetNS() string { return s.Address().String() }

func (s *worldSlot) OpenTap() (*os.File, error) {
	if s.w.fails("tap") {
		return nil, errInjected
	}
	return os.Open(os.DevNull)
}

func (s *worldSlot) Describe(any) error { return nil }

// Limit implements Slot.
func (s *worldSlot) Limit(r rates.Rates) error {
	if s.w.fails("limit") {
		return errInjected
	}
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	s.rates = r
	return nil
}

// Acquire implements Networks.
func (w *world) Acquire(context.Context) (Slot, error) {
	if w.fails("acquire") {
		return nil, errInjected
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nextSlot++
	s := &worldSlot{w: w, index: w.nextSlot}
	w.slots[s.index] = s
	return s, nil
}

// Reclaim implements Networks.
func (w *world) Reclaim(_ context.Context, i, _ int) (Slot, error) {
	if w.fails("reclaim") {
		return nil, errInjected
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := w.slots[i]; s != nil {
		s.rates = rates.Rates{} // like the network pool, which resets them
		return s, nil
	}
	return nil, errors.New("no such slot")
}

// Forget implements Networks.
func (w *world) Forget(i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := w.slots[i]; s != nil {
		w.unusedLocked(s)
		delete(w.slots, i)
	}
}

// unusedLocked checks that no machine runs in a released slot.
func (w *world) unusedLocked(s Slot) {
	for _, vm := range w.vms {
		if vm.spec.NetNS == s.NetNS() {
			w.t.Errorf("slot %d was released under a running machine", s.Index())
		}
	}
}

// Release implements Networks.
func (w *world) Release(_ context.Context, s Slot) error {
	if w.fails("release") {
		return errInjected
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.unusedLocked(s)
	delete(w.slots, s.Index())
	return nil
}

func (w *world) Name() string        { return "world" }
func (w *world) Disks() disk.Format  { return cmp.Or(w.format, disk.Qcow2) }
func (w *world) Accelerator() string { return "none" }
func (w *world) Close() error        { return nil }
func (w *world) TracksMemory() bool  { return w.tracks }

// Start implements vmm.Driver.
func (w *world) Start(ctx context.Context, s vmm.Spec) (vmm.VM, error) {
	if w.onStart != nil {
		w.onStart(s)
	}
	if w.fails("start") {
		return nil, errInjected
	}
	const size = worldBlocks * memory.BlockSize
	vm, err := w.run(s, w.Kind(s.Nested), make([]byte, size), make([]byte, size))
	if err == nil {
		vm.data[0] = 1
		err = vm.Run(context.Background())
	}
	return vm, err
}

// run starts a machine, stopped, with the memory data on top of base.
func (w *world) run(s vmm.Spec, kind string, data, base []byte) (*worldVM, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(s.NetNS, fmt.Sprint(hostwire.GuestPort)))
	if err != nil {
		return nil, err
	}
	vm := &worldVM{w: w, spec: s, kind: kind, data: data, base: base, done: make(chan struct{}), listener: l, runs: make(chan struct{})}
	w.mu.Lock()
	if w.vms[s.ID] != nil {
		w.t.Errorf("sandbox %s has two machines", s.ID)
	}
	w.vms[s.ID] = vm
	w.started++
	vm.responds = w.responds
	w.mu.Unlock()
	go func() { _ = http.Serve(l, vm) }()
	return vm, nil
}

// Kind implements vmm.Driver.
func (w *world) Kind(nested bool) string {
	if nested {
		return "world" + w.version + "+nested"
	}
	return "world" + w.version
}

// Nested implements vmm.Driver.
func (w *world) Nested(kind string) bool { return strings.HasSuffix(kind, "+nested") }

// Restores implements vmm.Driver.
func (w *world) Restores(kind string) error {
	if strings.TrimSuffix(kind, "+nested") > w.Kind(false) {
		return errors.New("a later world")
	}
	return nil
}

// Restore implements vmm.Driver.
func (w *world) Restore(_ context.Context, s vmm.Spec, from vmm.Saved) (vmm.VM, error) {
	if w.fails("restore") {
		return nil, errInjected
	}
	if string(from.Devices) != "devices" {
		w.t.Errorf("restored with devices %q", from.Devices)
	}
	for _, name := range append([]string{s.Base, s.Overlay}, s.Layers...) {
		if _, err := os.Stat(name); err != nil {
			w.t.Errorf("restored without its disk: %v", err)
		}
	}
	data := make([]byte, worldBlocks*memory.BlockSize)
	if _, err := from.Memory.ReadAt(data, 0); err != nil {
		return nil, err
	}
	base := bytes.Clone(data)
	if from.Changed != nil {
		for p, err := range from.Changed {
			if err != nil {
				return nil, err
			}
			copy(data[p.Block*memory.BlockSize:], p.Data)
		}
	}
	if w.tracks {
		base = bytes.Clone(data)
	}
	return w.run(s, w.Kind(w.Nested(from.Kind)), data, base)
}

// worldBlocks is the number of blocks in a machine's memory.
const worldBlocks = 4

// Attach implements vmm.Driver.
func (w *world) Attach(ctx context.Context, st vmm.State) (vmm.VM, error) {
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if w.fails("attach") {
		return nil, errInjected
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if vm := w.vms[st.ID]; vm != nil {
		return vm, nil
	}
	return nil, vmm.ErrGone
}

// Lives implements vmm.Driver.
func (w *world) Lives(id uuid.UUID) (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.vms[id] != nil, nil
}

// Reap implements vmm.Driver.
func (w *world) Reap(_ context.Context, st vmm.State) error {
	w.mu.Lock()
	vm := w.vms[st.ID]
	w.mu.Unlock()
	if vm != nil {
		return vm.Kill(context.Background())
	}
	return nil
}

type worldVM struct {
	w        *world
	spec     vmm.Spec
	kind     string // the kind of monitor that started it
	mu       sync.Mutex
	data     []byte        // its memory
	base     []byte        // what Pages compares data with
	runs     chan struct{} // closed while the machine is not stopped
	frozen   bool
	once     sync.Once
	done     chan struct{}
	responds chan struct{}
	// unanswered counts requests whose client gave up before the machine ran and responded.
	unanswered atomic.Int32
	listener   net.Listener
	why        error  // why it ended; nil: it crashed
	said       string // its console; empty: a panic
}

func (v *worldVM) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v.mu.Lock()
	runs, responds := v.runs, v.responds
	v.mu.Unlock()
	for _, c := range []chan struct{}{runs, responds} {
		if c == nil {
			continue
		}
		select {
		case <-c:
		case <-v.done:
			return
		case <-r.Context().Done():
			v.unanswered.Add(1)
			return
		}
	}
	switch r.URL.Path {
	case "/init":
		if v.w.fails("init") {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		v.set(func() { v.frozen = false })
	case "/freeze":
		if v.w.fails("freeze") {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		v.set(func() { v.frozen = true })
	case "/thaw":
		v.set(func() { v.frozen = false })
	}
	w.WriteHeader(http.StatusNoContent)
}

func (v *worldVM) set(f func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	f()
}

// held reports whether the machine or its programs are stopped.
func (v *worldVM) held() (held bool) {
	v.set(func() {
		select {
		case <-v.runs:
			held = v.frozen
		default:
			held = true
		}
	})
	return held
}

// count is the guest's program: it counts in the machine's memory while the machine runs.
// ok is false once the machine has ended.
func (v *worldVM) count() (n byte, ok bool) {
	for {
		v.mu.Lock()
		runs := v.runs
		select {
		case <-v.done: // checked first, because runs may be closed as well
			v.mu.Unlock()
			return 0, false
		default:
		}
		select {
		case <-runs:
			for _, other := range []int{1, 3} {
				if was := v.data[other*memory.BlockSize]; was != v.data[2*memory.BlockSize] {
					v.w.t.Errorf("page %d should equal page 2, which has %d, but has %d", other, v.data[2*memory.BlockSize], was)
				}
			}
			for page := 1; page < worldBlocks; page++ {
				v.data[page*memory.BlockSize]++
			}
			n = v.data[2*memory.BlockSize]
			v.mu.Unlock()
			return n, true
		default:
		}
		v.mu.Unlock()
		select {
		case <-runs:
		case <-v.done:
		}
	}
}

// die ends the machine as if it had crashed.
func (v *worldVM) die() { v.end(1) }

// end ends the machine and adds to the deaths that the world counts for it.
func (v *worldVM) end(deaths int) {
	v.once.Do(func() {
		_ = v.listener.Close()
		v.w.mu.Lock()
		delete(v.w.vms, v.spec.ID)
		v.w.deaths[v.spec.ID] += deaths
		close(v.done)
		v.w.mu.Unlock()
	})
}

func (v *worldVM) State() vmm.State      { return vmm.State{ID: v.spec.ID, PID: 1, Kind: v.kind} }
func (v *worldVM) PID() int              { return 1 }
func (v *worldVM) Done() <-chan struct{} { return v.done }
func (v *worldVM) Err() error            { return cmp.Or(v.why, errors.New("it died")) }

func (v *worldVM) Console(context.Context) ([]byte, error) {
	return []byte(cmp.Or(v.said, "Kernel panic\x1b[0m - not syncing\n")), nil
}

func (v *worldVM) Memory() (int64, error) { return 1 << 20, nil }

func (v *worldVM) Hold(context.Context) error {
	if v.w.fails("hold") {
		return errInjected
	}
	select {
	case <-v.done:
		return errors.New("it has ended")
	default:
	}
	v.set(func() {
		select {
		case <-v.runs:
			v.runs = make(chan struct{})
		default:
		}
	})
	return nil
}

func (v *worldVM) Run(context.Context) error {
	if v.w.fails("run") {
		return errInjected
	}
	if v.w.fails("die") {
		v.die()
		return nil
	}
	if v.w.fails("hang") {
		v.set(func() { v.responds = make(chan struct{}) })
	}
	v.set(func() {
		select {
		case <-v.runs:
		default:
			close(v.runs)
		}
	})
	return nil
}

func (v *worldVM) Devices(context.Context) ([]byte, error) {
	if v.w.fails("devices") {
		return nil, errInjected
	}
	return []byte("devices"), nil
}

func (v *worldVM) Pages() memory.Pages {
	return func(yield func(memory.Page, error) bool) {
		if v.w.fails("pages") {
			yield(memory.Page{}, errInjected)
			return
		}
		for n := range uint64(worldBlocks) {
			page := v.data[n*memory.BlockSize:][:memory.BlockSize]
			if !bytes.Equal(page, v.base[n*memory.BlockSize:][:memory.BlockSize]) && !yield(memory.Page{Block: n, Data: page}, nil) {
				return
			}
		}
	}
}

func (v *worldVM) Divert(_ context.Context, path string) error {
	if v.w.fails("divert") {
		return errInjected
	}
	_, err := os.Stat(path)
	return err
}

func (v *worldVM) Grow(context.Context, int64) error { return nil }

func (v *worldVM) Kill(context.Context) error {
	if v.w.fails("kill") {
		return errInjected
	}
	v.end(0)
	return nil
}
