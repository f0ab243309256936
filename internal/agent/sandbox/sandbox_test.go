package sandbox

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// These tests are about the order in which things happen and what is left
// after failures. Machines and networks are stand-ins that can fail at any
// step; a stand-in of a machine answers at its slot's (loopback) address as
// the guest daemon does. Real machines are in the agent's own tests.

var errInjected = errors.New("injected failure")

// world is a stand-in of a host. What is in it outlives managers.
type world struct {
	t   testing.TB
	net byte // second byte of its addresses, see [claimNet]

	mu       sync.Mutex
	rng      *rand.Rand
	failing  map[string]float64 // step → how likely it fails
	slots    map[int]*worldSlot
	nextSlot int
	vms      map[uuid.UUID]*worldVM
	deaths   map[uuid.UUID]int // how many machines of a sandbox ended by themselves
	started  int
	hold     chan struct{}  // machines are healthy once it is closed; nil: at once
	warm     int            // how many machines of a template wait
	tracks   bool           // what machines write to is known
	onStart  func(vmm.Spec) // nil: nothing
	usual    int            // MiB of memory that most sandboxes begin with; 0: nobody knows
	boots    time.Duration  // how long a guest may take to come up; 0: [await.Hang]
	rates    rates.Rates    // of each sandbox
	special  rates.Templates
	nested   []Team
	modules  string      // path of the kernel's modules
	format   disk.Format // of machines' disks; nil: qcow2
	version  string      // of the monitor: it restores what was saved under the same, or an earlier one
}

// count is how many machines were made.
func (w *world) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.started
}

// nets counts the networks that claimNet has looked at. It begins anywhere, so
// that processes that run these tests at the same time seldom meet.
var nets = func() *atomic.Uint32 {
	n := new(atomic.Uint32)
	n.Store(rand.Uint32())
	return n
}()

// claimNet returns a second byte of loopback addresses that no other world has,
// in this process or another, until the test ends. The claim is a listener on
// an address that no slot gets.
func claimNet(t testing.TB) byte {
	t.Helper()
	const first, last = 128, 254
	for range last - first + 1 {
		n := byte(first + nets.Add(1)%(last-first+1))
		l, err := net.Listen("tcp", fmt.Sprintf("127.%d.255.254:%d", n, guest.Port))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return n
	}
	t.Fatal("other tests have all networks of loopback addresses")
	return 0
}

func newWorld(t testing.TB, seed uint64) *world {
	w := &world{
		t: t, net: claimNet(t), rng: rand.New(rand.NewPCG(seed, 1)),
		tracks: seed%2 == 0, failing: map[string]float64{}, slots: map[int]*worldSlot{}, vms: map[uuid.UUID]*worldVM{}, deaths: map[uuid.UUID]int{},
	}
	t.Cleanup(func() { // before the claim ends
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
	rates rates.Rates // under the world's mu
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
		s.rates = rates.Rates{} // the pool's own
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

// unusedLocked checks that no machine runs in a slot that goes.
func (w *world) unusedLocked(s Slot) {
	for _, vm := range w.vms {
		if vm.spec.NetNS == s.NetNS() {
			w.t.Errorf("slot %d was released under a machine that runs", s.Index())
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

// run makes a machine, held, whose memory has changed where it is not base.
func (w *world) run(s vmm.Spec, kind string, data, base []byte) (*worldVM, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(s.NetNS, fmt.Sprint(guest.Port)))
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
	vm.hold = w.hold
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
			w.t.Errorf("restored with a disk that is not there: %v", err)
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

// worldBlocks is how much of a machine's memory is ever used.
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
	kind     string // what it was made under
	mu       sync.Mutex
	data     []byte        // of its memory
	base     []byte        // what of that it has not changed is so
	runs     chan struct{} // closed while it is not held
	frozen   bool
	once     sync.Once
	done     chan struct{}
	hold     chan struct{}
	listener net.Listener
	why      error  // it ended; nil: it died
	said     string // by its guest on the console; empty: a panic
}

func (v *worldVM) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v.mu.Lock()
	runs, hold := v.runs, v.hold
	v.mu.Unlock()
	for _, c := range []chan struct{}{runs, hold} {
		if c == nil {
			continue
		}
		select {
		case <-c:
		case <-v.done:
			return
		case <-r.Context().Done():
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

// held tells whether the machine or its programs stand still.
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

// count is what the guest's program does: it counts, in its memory, while the
// machine runs. It is false once that has ended.
func (v *worldVM) count() (n byte, ok bool) {
	for {
		v.mu.Lock()
		runs := v.runs
		select {
		case <-v.done: // also if it ran
			v.mu.Unlock()
			return 0, false
		default:
		}
		select {
		case <-runs:
			for _, other := range []int{1, 3} {
				if was := v.data[other*memory.BlockSize]; was != v.data[2*memory.BlockSize] {
					v.w.t.Errorf("page %d was written with %d, and has %d", other, v.data[2*memory.BlockSize], was)
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

// die is what a machine does by itself.
func (v *worldVM) die() { v.end(1) }

// end ends the machine, which adds to its sandbox's deaths.
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
		v.set(func() { v.hold = make(chan struct{}) })
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

// host is a world with a manager.
type host struct {
	*Manager
	w   *world
	dir layout.Dir
}

func (w *world) open(dir layout.Dir) *host {
	w.t.Helper()
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("WRENN_TEST_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if _, err := os.Stat(dir.Template(uuid.Nil, uuid.Nil)); err != nil {
		home := dir.Template(uuid.Nil, uuid.Nil)
		if err := os.MkdirAll(home, 0o700); err != nil {
			w.t.Fatal(err)
		}
		for name, content := range map[string]string{"rootfs.ext4": "base", "template.json": `{"name":"minimal","disk_mib":64}`} {
			if err := os.WriteFile(filepath.Join(home, name), []byte(content), 0o600); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	j, err := journal.Open(dir)
	if err != nil {
		w.t.Fatal(err)
	}
	r, err := Recover(context.Background(), dir, w, log)
	if err != nil {
		w.t.Fatal(err)
	}
	// As the network pool does: what is not kept is gone.
	keep := r.Slots()
	w.mu.Lock()
	for i, s := range w.slots {
		used := slices.ContainsFunc(slices.Collect(maps.Values(w.vms)), func(vm *worldVM) bool { return vm.spec.NetNS == s.NetNS() })
		if !slices.Contains(keep, i) && (!r.Unknown() || !used) {
			delete(w.slots, i)
		}
	}
	w.mu.Unlock()
	problems := problem.Open(filepath.Join(w.t.TempDir(), "problems.json"), log)
	m, err := Open(context.Background(), Config{
		DefaultVCPUs: min(1, w.usual), DefaultMemoryMiB: w.usual,
		Dir: dir, Driver: w, Networks: w, Journal: j, Problems: problems, Rates: w.rates, TemplateRates: w.special, NestedTeams: w.nested, Kernel: "k", Initrd: "i", Modules: w.modules, KernelInputs: w.modules, MemoryMiB: 4096, Boots: 3,
		BootTimeout: cmp.Or(w.boots, await.Hang), Settle: time.Nanosecond, Log: log, Warm: w.warm, WarmMemoryMiB: 1024,
		Template: func(team, template uuid.UUID) (image.Template, error) {
			t, err := image.Find(dir, team, template)
			if template != uuid.Nil && err != nil {
				return image.Template{}, fail(ErrNotFound, "no such template")
			}
			if template != uuid.Nil {
				return t, nil
			}
			return image.Find(dir, uuid.Nil, uuid.Nil)
		},
	}, r)
	if err != nil {
		w.t.Fatal(err)
	}
	return &host{m, w, dir}
}

// close lets go of everything as an agent that ends does.
func (h *host) close() []int {
	h.w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), await.Hang)
	defer cancel()
	slots, err := h.Close(ctx)
	if err != nil {
		h.w.t.Error(err)
	}
	if err := h.Journal.Close(); err != nil {
		h.w.t.Error(err)
	}
	return slots
}

// nothingLeft checks that no sandbox has left anything.
func (h *host) nothingLeft() {
	h.w.t.Helper()
	h.awaitCaptures()
	if l := h.List(); len(l) != 0 {
		h.w.t.Errorf("sandboxes are left: %v", l)
	}
	h.bases.drop()
	if reserved, _ := h.Memory(); reserved != 0 || len(h.bases.known) != 0 {
		h.w.t.Errorf("%d MiB stay reserved, and bases %v", reserved, h.bases.known)
	}
	if len(h.boots) != 0 {
		h.w.t.Errorf("%d boots are still counted", len(h.boots))
	}
	if entries, err := os.ReadDir(h.dir.Sandboxes()); err != nil || len(entries) != 0 {
		h.w.t.Errorf("folders are left: %v %v", entries, err)
	}
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if len(h.w.slots) != 0 || len(h.w.vms) != 0 {
		h.w.t.Errorf("slots %v and machines %v are left", h.w.slots, h.w.vms)
	}
}

// awaitCaptures waits until no template is being captured.
func (h *host) awaitCaptures() {
	h.mu.Lock()
	all := slices.Collect(maps.Values(h.capturing))
	h.mu.Unlock()
	for _, c := range all {
		<-c.done
	}
}

// destroyAll ends what is paused or runs.
func (h *host) destroyAll() {
	h.w.t.Helper()
	for _, i := range h.List() {
		if err := h.Destroy(context.Background(), i.ID); err != nil {
			h.w.t.Error(err)
		}
	}
}

func newHost(t testing.TB) *host {
	t.Helper()
	h := newWorld(t, 1).open(layout.Dir(t.TempDir()))
	t.Cleanup(func() { h.close() })
	return h
}

func spec() Spec {
	return Spec{ID: uuid.New(), VCPUs: 1, MemoryMiB: 128, Token: "token"}
}

func (h *host) event(t testing.TB, id uuid.UUID) journal.Event {
	t.Helper()
	var got journal.Event
	err := h.Journal.Follow(await.Context(t), func(e journal.Event) error {
		if e.Sandbox == id {
			got = e
			return errInjected
		}
		return nil
	})
	if !errors.Is(err, errInjected) {
		t.Fatalf("no event of the sandbox: %v", err)
	}
	return got
}

func (h *host) awaitGone(t testing.TB, id uuid.UUID) {
	t.Helper()
	b, err := h.find(id)
	if err != nil {
		return
	}
	await.Recv(t, "the sandbox goes", b.gone)
}

func TestCreateUseDestroy(t *testing.T) {
	h := newHost(t)
	s := spec()
	s.Envs = map[string]string{"A": "b"}
	info, err := h.Create(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if info.State != Running || info.DiskMiB != 64 || !info.ExpiresAt.IsZero() || len(info.Steps) < 6 {
		t.Errorf("created %+v", info)
	}
	if again, err := h.Create(t.Context(), s); err != nil || again.CreatedAt != info.CreatedAt || h.w.started != 2 {
		t.Errorf("a repeated create made %+v, %v", again, err)
	}
	other := s
	other.Team = uuid.New()
	if _, err := h.Create(t.Context(), other); !errors.Is(err, ErrExists) {
		t.Errorf("another sandbox of the same id: %v", err)
	}
	st, err := os.Stat(h.dir.SandboxRecord(s.ID))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the record: %v %v", st, err)
	}
	u, err := h.Use(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Destroy(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	await.Recv(t, "a use ends with its sandbox", u.Context.Done())
	if cause := context.Cause(u.Context); !strings.Contains(cause.Error(), "destroyed") {
		t.Error(cause)
	}
	u.End()
	u.End()
	if err := h.Destroy(t.Context(), s.ID); err != nil {
		t.Errorf("the second destroy: %v", err)
	}
	if _, err := h.Use(t.Context(), s.ID); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if p := h.Journal.Pending(); len(p) != 0 {
		t.Errorf("a wanted end is an event: %v", p)
	}
	h.nothingLeft()
}

func TestBadSpecs(t *testing.T) {
	h := newHost(t)
	for name, test := range map[string]struct {
		change func(*Spec)
		want   error
	}{
		"no processor":      {func(s *Spec) { s.VCPUs = 0 }, ErrInvalid},
		"too many at all":   {func(s *Spec) { s.VCPUs = MaxVCPUs + 1 }, ErrInvalid},
		"no memory":         {func(s *Spec) { s.MemoryMiB = 0 }, ErrInvalid},
		"negative memory":   {func(s *Spec) { s.MemoryMiB = -5 }, ErrInvalid},
		"too much memory":   {func(s *Spec) { s.MemoryMiB = MaxMemoryMiB + 1 }, ErrInvalid},
		"more than host":    {func(s *Spec) { s.MemoryMiB = 4096 }, ErrExhausted},
		"small disk":        {func(s *Spec) { s.DiskMiB = 63 }, ErrInvalid},
		"huge disk":         {func(s *Spec) { s.DiskMiB = MaxDiskMiB + 1 }, ErrInvalid},
		"negative time-out": {func(s *Spec) { s.Timeout = -time.Second }, ErrInvalid},
		"long time-out":     {func(s *Spec) { s.Timeout = MaxTimeout + 1 }, ErrInvalid},
		"no token":          {func(s *Spec) { s.Token = "" }, ErrInvalid},
		"no such template":  {func(s *Spec) { s.Template = uuid.New() }, ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			s := spec()
			test.change(&s)
			if _, err := h.Create(t.Context(), s); !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
		})
	}
	h.nothingLeft()
}

func TestMemoryIsAdmittedOnce(t *testing.T) {
	h := newHost(t)
	var ok, refused atomic.Int32
	var wg sync.WaitGroup
	for range 12 {
		wg.Go(func() {
			s := spec()
			s.MemoryMiB = 512 // with overhead 576: seven fit
			switch _, err := h.Create(t.Context(), s); {
			case err == nil:
				ok.Add(1)
			case errors.Is(err, ErrExhausted):
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if ok.Load() != 7 || refused.Load() != 5 {
		t.Errorf("%d created, %d refused", ok.Load(), refused.Load())
	}
	if err := h.Terminate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Create(t.Context(), spec()); !errors.Is(err, ErrClosing) {
		t.Errorf("create after terminate: %v", err)
	}
	for _, i := range h.List() {
		if i.State != Paused {
			t.Errorf("after terminate a sandbox is %s", i.State)
		}
		if e := h.event(t, i.ID); e.Kind != journal.Paused {
			t.Errorf("event %+v", e)
		}
	}
	if reserved := h.reservedMiB; reserved != 0 {
		t.Errorf("paused sandboxes have %d MiB", reserved)
	}
	h.destroyAll()
	h.nothingLeft()
}

func TestEveryFailureLeavesNothing(t *testing.T) {
	for step, want := range map[string]string{
		"acquire": "network slot", "tap": "network card", "start": "start the virtual machine",
		"die": "Kernel panic", "hang": "did not come up within 2s", "init": "boot",
	} {
		t.Run(step, func(t *testing.T) {
			w := newWorld(t, 1)
			if step == "hang" {
				w.boots = 2 * time.Second
			}
			h := w.open(layout.Dir(t.TempDir()))
			defer h.close()
			h.w.setFailing(map[string]float64{step: 1})
			_, err := h.Create(t.Context(), spec())
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error %q does not say %q", err, want)
			}
			blamed := ErrStart
			switch step {
			case "die", "init":
				blamed = ErrGuest
			case "hang":
				blamed = ErrSlow // Who knows.
			}
			for _, kind := range []error{ErrStart, ErrGuest, ErrSlow} {
				if errors.Is(err, kind) != (kind == blamed) {
					t.Errorf("error %q: want %q", err, blamed)
				}
			}
			h.nothingLeft()
		})
	}
	t.Run("disk", func(t *testing.T) {
		h := newHost(t)
		s := spec()
		if err := os.WriteFile(h.dir.Sandbox(s.ID), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Create(t.Context(), s); err == nil {
			t.Error("created without a folder")
		}
		h.nothingLeft()
	})
}

func TestDestroyWhileCreating(t *testing.T) {
	h := newHost(t)
	h.w.hold = make(chan struct{}) // never healthy
	s := spec()
	created := make(chan error)
	go func() {
		_, err := h.Create(context.Background(), s)
		created <- err
	}()
	await.Until(t, "it starts", func() bool { return h.info(s.ID).State == Starting })
	if err := h.Destroy(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	if err := <-created; !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "destroyed") {
		t.Errorf("create ended with %v", err)
	}
	close(h.w.hold) // The capture that it waited for ends.
	h.nothingLeft()
}

func (h *host) info(id uuid.UUID) Info {
	i, _ := h.Get(id)
	return i
}

// TestAbandonedCreate: the last caller to go ends the start, the first does not.
func TestAbandonedCreate(t *testing.T) {
	h := newHost(t)
	h.w.hold = make(chan struct{})
	s := spec()
	first, leaveFirst := context.WithCancel(t.Context())
	second, leaveSecond := context.WithCancel(t.Context())
	defer leaveSecond()
	ended := make(chan error)
	go func() { _, err := h.Create(first, s); ended <- err }()
	await.Until(t, "it starts", func() bool { return h.info(s.ID).State == Starting })
	go func() { _, err := h.Create(second, s); ended <- err }()
	b, err := h.find(s.ID)
	if err != nil {
		t.Fatal(err)
	}
	await.Until(t, "both wait", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.waiters == 2
	})
	leaveFirst()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if h.info(s.ID).State != Starting {
		t.Error("the start ended with its first caller")
	}
	leaveSecond()
	<-ended
	h.awaitGone(t, s.ID)
	close(h.w.hold) // The capture that it waited for ends.
	h.nothingLeft()
}

func TestExpiry(t *testing.T) {
	h := newHost(t)
	s := spec()
	var u *Use
	for s.Timeout = 300 * time.Millisecond; ; s.Timeout *= 2 { // until it is long enough to use it
		begun := time.Now()
		info, err := h.Create(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		if at := info.ExpiresAt; at.Before(begun.Add(s.Timeout)) || at.After(time.Now().Add(s.Timeout)) {
			t.Errorf("it expires at %v, created between %v and now", at, begun)
		}
		if u, err = h.Use(t.Context(), s.ID); err == nil {
			break
		}
		h.awaitGone(t, s.ID)
		s.ID = uuid.New()
	}
	time.Sleep(2 * s.Timeout)
	if u.Context.Err() != nil || h.info(s.ID).State != Running {
		t.Fatal("it expired while it was used")
	}
	ended := time.Now()
	u.End()
	e := h.event(t, s.ID)
	if e.Kind != journal.Expired || !strings.Contains(e.Reason, s.Timeout.String()) {
		t.Errorf("event %+v", e)
	}
	if e.Time.Before(ended.Add(s.Timeout)) {
		t.Errorf("it expired at %v, its use having ended at %v", e.Time, ended)
	}
	h.awaitGone(t, s.ID)
	h.nothingLeft()
}

// TestGuestShutsDown: a sandbox whose guest shuts down ends.
func TestGuestShutsDown(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	h.machine(id).dieOf(&vmm.GuestEnd{Off: true, Reason: "guest-shutdown"}, "")
	if e := h.event(t, id); e.Kind != journal.Exited || e.Reason != "the guest shut down (guest-shutdown)" {
		t.Errorf("event %+v", e)
	}
	h.awaitGone(t, id)
	h.nothingLeft()
}

func TestRemovalIsTriedAgain(t *testing.T) {
	for _, step := range []string{"kill", "release"} {
		t.Run(step, func(t *testing.T) {
			h := newHost(t)
			s := spec()
			if _, err := h.Create(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			h.w.setFailing(map[string]float64{step: 1})
			if err := h.Destroy(t.Context(), s.ID); !errors.Is(err, errInjected) {
				t.Fatalf("destroy: %v", err)
			}
			if h.info(s.ID).State != Stopping {
				t.Error("it is not stopping")
			}
			h.w.setFailing(nil)
			err := h.Destroy(t.Context(), s.ID)
			if errors.Is(err, errInjected) { // a try that had begun before
				err = h.Destroy(t.Context(), s.ID)
			}
			if err != nil {
				t.Fatal(err)
			}
			h.nothingLeft()
		})
	}
}

func TestNextAgentTakesBack(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	h := w.open(dir)
	keep, lost := spec(), spec()
	keep.Timeout = time.Hour
	for _, s := range []Spec{keep, lost} {
		if _, err := h.Create(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	before := h.info(keep.ID)
	if slots := h.close(); len(slots) != 2 {
		t.Errorf("slots %v are in use", slots)
	}
	w.vms[lost.ID].die()
	// Folders as a killed agent leaves them.
	bare := uuid.New()
	if err := os.Mkdir(dir.Sandbox(bare), 0o700); err != nil {
		t.Fatal(err)
	}
	torn := uuid.New()
	if err := os.Mkdir(dir.Sandbox(torn), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir.SandboxRecord(torn), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}

	h = w.open(dir)
	defer h.close()
	for _, id := range []uuid.UUID{bare, torn} {
		h.awaitGone(t, id)
	}
	if e := h.event(t, lost.ID); e.Kind != journal.Paused {
		t.Errorf("event %+v", e)
	}
	if i := h.info(lost.ID); i.State != Paused || i.Condition == nil || i.Condition.Reason != condition.Killed {
		t.Errorf("the one whose machine ended is %+v", i)
	}
	after := h.info(keep.ID)
	if after.State != Running || after.ID != before.ID || after.MemoryMiB != before.MemoryMiB || !after.CreatedAt.Equal(before.CreatedAt) || after.ExpiresAt.IsZero() {
		t.Errorf("taken back as %+v, was %+v", after, before)
	}
	u, err := h.Use(t.Context(), keep.ID)
	if err != nil {
		t.Fatal(err)
	}
	u.End()
	h.destroyAll()
	h.nothingLeft()
}

// TestLockOrder: whoever looks at a sandbox, refuses to use it, waits for it or
// lets go of it, in whatever order, nobody waits for ever.
func TestLockOrder(t *testing.T) {
	w := newWorld(t, 1)
	h := w.open(layout.Dir(t.TempDir()))
	s := spec()
	if _, err := h.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	b, err := h.find(s.ID)
	if err != nil {
		t.Fatal(err)
	}
	b.tracker.Shut() // as it is in the moment in which a sandbox expires
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		for _, call := range []func(){
			func() {
				if u, err := h.Use(t.Context(), s.ID); err == nil {
					u.End()
					t.Error("it was used")
				}
			},
			func() { _, _ = h.Create(t.Context(), s) },
			func() { h.List(); h.Memory() },
			func() { _, _ = h.Get(s.ID) },
		} {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						call()
					}
				}
			})
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 1000 {
			_, _ = h.Create(t.Context(), s)
			_, _ = h.Use(t.Context(), s.ID)
		}
		h.close()
		for range 100 { // what is closed is asked, too
			_, _ = h.Use(t.Context(), s.ID)
		}
		close(stop)
		wg.Wait()
	}()
	select {
	case <-done:
	case <-time.After(await.Hang):
		buf := make([]byte, 1<<20)
		t.Fatalf("it hangs:\n%s", buf[:runtime.Stack(buf, true)])
	}
}

// TestRandomLives lets many callers do random things while steps fail at
// random and agents come and go. In the end nothing is left.
func TestRandomLives(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			randomLives(t, seed+uint64(time.Now().UnixNano())<<8)
		})
	}
}

func randomLives(t *testing.T, seed uint64) {
	t.Logf("seed %d", seed)
	w := newWorld(t, seed)
	dir := layout.Dir(t.TempDir())
	w.warm, w.boots = int(seed%3), 2*time.Second
	ids := make([]uuid.UUID, 5)
	templates := make([]uuid.UUID, 2)
	for i := range ids {
		ids[i] = uuid.New()
	}
	for i := range templates {
		templates[i] = uuid.New()
	}
	known := lives{known: map[uuid.UUID]life{}}
	for generation := range 3 {
		h := w.open(dir)
		w.setFailing(map[string]float64{
			"acquire": .05, "tap": .05, "start": .1, "die": .05, "hang": .01, "init": .05, "kill": .1, "release": .1,
			"restore": .05, "hold": .05, "freeze": .05, "devices": .05, "pages": .05, "divert": .05,
		})
		var wg sync.WaitGroup
		for worker := range uint64(6) {
			rng := rand.New(rand.NewPCG(seed, worker<<8|uint64(generation)))
			wg.Go(func() {
				for range 25 {
					h.doSomething(rng, ids, templates, &known)
				}
			})
		}
		wg.Wait()
		w.setFailing(nil)
		if generation < 2 {
			h.close()
			continue
		}
		if err := h.Terminate(context.Background()); err != nil {
			t.Errorf("terminate: %v", err)
		}
		w.mu.Lock()
		if len(w.vms) != 0 || len(w.slots) != 0 {
			t.Errorf("after terminate there are machines %v and slots %v", w.vms, w.slots)
		}
		w.mu.Unlock()
		h.destroyAll()
		h.nothingLeft()
		h.noneHidden(t)
		h.close()
	}
	if entries, _ := filepath.Glob(string(dir) + "/sandboxes/*"); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}

func (h *host) doSomething(rng *rand.Rand, ids, templates []uuid.UUID, known *lives) {
	id, template := ids[rng.IntN(len(ids))], templates[rng.IntN(len(templates))]
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(1+rng.IntN(300))*time.Millisecond)
	defer cancel()
	switch n := rng.IntN(14); n {
	case 0, 1:
		s := spec()
		s.ID = id
		s.Timeout = time.Duration(rng.IntN(2)) * time.Duration(20+rng.IntN(200)) * time.Millisecond
		s.PauseOnTimeout = rng.IntN(2) == 0
		if rng.IntN(4) == 0 {
			s.Template = template
		}
		if i, err := h.Create(ctx, s); err == nil && i.State == Starting {
			h.w.t.Errorf("a created sandbox is %s", i.State)
		}
	case 2:
		_ = h.Destroy(ctx, id)
	case 3:
		if u, err := h.Use(ctx, id); err == nil {
			known.use(h, u)
			select {
			case <-u.Context.Done():
			case <-time.After(time.Duration(rng.IntN(30)) * time.Millisecond):
			}
			u.End()
		}
	case 4:
		h.w.mu.Lock()
		vm := h.w.vms[id]
		h.w.mu.Unlock()
		if vm != nil {
			vm.die()
		}
	case 5:
		h.List()
		_, _ = h.Console(ctx, id)
	default:
		h.change(ctx, n-6, id, template)
	}
}

func TestTrackerDrains(t *testing.T) {
	tr := NewTracker()
	leave, ok := tr.Enter()
	if !ok {
		t.Fatal("a new tracker is shut")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := tr.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("drained with one in flight: %v", err)
	}
	if _, ok := tr.Enter(); ok {
		t.Error("entered while draining")
	}
	leave()
	leave()
	if n := tr.InFlight(); n != 0 {
		t.Errorf("%d in flight", n)
	}
	if err := tr.Drain(t.Context()); err != nil {
		t.Error(err)
	}
	tr.Reopen()
	if leave, ok = tr.Enter(); !ok {
		t.Error("shut after reopening")
	} else {
		leave()
	}
}

func FuzzParseRecord(f *testing.F) {
	id := uuid.New()
	for _, state := range []string{`"running","slot":3,"vm":{"id":"` + id.String() + `"}`, `"paused","saved":"` + id.String() + `"`} {
		f.Add([]byte(`{"version":2,"home":"` + id.String() + `","spec":{"id":"` + id.String() + `"},"disks":2,"sealed":1,"state":` + state + `}`))
	}
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord("sandbox.json", b, id)
		if err == nil && r.State == Running && (r.Slot == nil || r.VM == nil) {
			t.Error("a running sandbox without a place was read")
		}
		if err == nil && r.State == Paused && (r.Saved == nil || r.Disks < 1 || r.Sealed > r.Disks) {
			t.Error("a paused sandbox without what was saved of it was read")
		}
	})
}
