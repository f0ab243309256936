package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"golang.org/x/sys/unix"
)

// host is a manager in a world.
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
	// Remove the slots that nobody keeps, like the network pool.
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
		BootTimeout: cmp.Or(w.boots, await.Hang), CaptureDelay: time.Nanosecond, Log: log, Warm: w.warm, WarmMemoryMiB: 1024,
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

// close closes the manager and the journal, like an agent that stops. It returns the slots in
// use.
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

// nothingLeft checks that the sandboxes left nothing behind.
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

// destroyAll destroys every sandbox.
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
	inst, err := h.find(id)
	if err != nil {
		return
	}
	await.Recv(t, "the sandbox is gone", inst.gone)
}

// instance returns a sandbox's instance.
func (h *host) instance(t testing.TB, id uuid.UUID) *instance {
	t.Helper()
	inst, err := h.find(id)
	if err != nil {
		t.Fatal(err)
	}
	return inst
}

func (h *host) info(id uuid.UUID) Info {
	i, _ := h.Get(id)
	return i
}

func (h *host) create(t testing.TB, change func(*Spec)) uuid.UUID {
	t.Helper()
	s := spec()
	if change != nil {
		change(&s)
	}
	if _, err := h.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	return s.ID
}

// counts counts once in a sandbox.
func (h *host) counts(t testing.TB, id uuid.UUID) byte {
	t.Helper()
	u, err := h.Use(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer u.End()
	n, ok := u.VM.(*worldVM).count()
	if !ok {
		t.Fatal("its machine has ended")
	}
	return n
}

// runs checks that a sandbox continues to count after n.
func (h *host) runs(t testing.TB, id uuid.UUID, n byte) {
	t.Helper()
	if got := h.info(id).State; got != Running {
		t.Fatalf("the sandbox is %s", got)
	}
	if got := h.counts(t, id); got != n+1 {
		t.Errorf("the sandbox counted to %d, and before that to %d", got, n)
	}
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	for _, vm := range h.w.vms {
		if vm.held() {
			t.Errorf("the machine of slot %s is stopped", vm.spec.NetNS)
		}
	}
}

// files describes the contents of a sandbox's folder.
func (h *host) files(t testing.TB, id uuid.UUID) string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(h.dir.Sandbox(id), func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			rel, _ := filepath.Rel(h.dir.Sandbox(id), path)
			all = append(all, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, "\n")
}

func isState(err error, s State) bool {
	var state *StateError
	return errors.As(err, &state) && state.State == s
}

// isReleased checks that a paused sandbox has no machine and no network.
func (h *host) isReleased(t testing.TB, id uuid.UUID) {
	t.Helper()
	inst, err := h.find(id)
	if err != nil {
		t.Fatal(err)
	}
	// The sandbox accepts orders only once its machine is gone.
	if err := inst.order(t.Context(), func(context.Context) error { return nil }); err != nil {
		t.Fatal(err)
	}
	inst.mu.Lock()
	defer inst.mu.Unlock()
	if inst.vm != nil || inst.slot != nil {
		t.Errorf("a paused sandbox has machine %v and slot %v", inst.vm, inst.slot)
	}
}

// noneHidden checks that no unpublished forks or images are left.
func (h *host) noneHidden(t testing.TB) {
	t.Helper()
	for _, dir := range []string{h.dir.Forks(), h.dir.Images()} {
		all, err := filepath.Glob(filepath.Join(dir, "*"))
		for _, name := range all {
			if strings.HasPrefix(filepath.Base(name), ".") || dir == h.dir.Forks() {
				t.Errorf("%s is left", name)
			}
		}
		if err != nil {
			t.Error(err)
		}
	}
}

// awaitWarm waits until n warm machines of the host are ready.
func (h *host) awaitWarm(t *testing.T, n int) {
	t.Helper()
	await.Until(t, fmt.Sprintf("%d warm machines are ready", n), func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.warm.ready) == n
	})
}

// denyFiles makes the creation of files in a folder fail, even for root, like on a full
// file system.
func denyFiles(t testing.TB, dir string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	immutable(t, dir, true)
	t.Cleanup(func() { immutable(t, dir, false) })
}

func allowFiles(t testing.TB, dir string) { immutable(t, dir, false) }

// immutable sets or clears a folder's attribute FS_IMMUTABLE_FL (see ioctl_iflags(2)).
func immutable(t testing.TB, dir string, on bool) {
	t.Helper()
	f, err := os.Open(dir)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		t.Skipf("this file system has no file attributes: %v", err)
	}
	const immutable = 0x10
	flags &^= immutable
	if on {
		flags |= immutable
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags); err != nil {
		t.Skipf("this file system has no file attributes: %v", err)
	}
}
