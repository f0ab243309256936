package sandbox

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// TestLockOrder checks for deadlocks between callers that read, use, create and close
// sandboxes in any order.
func TestLockOrder(t *testing.T) {
	w := newWorld(t, 1)
	h := w.open(layout.Dir(t.TempDir()))
	s := spec()
	if _, err := h.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	inst, err := h.find(s.ID)
	if err != nil {
		t.Fatal(err)
	}
	inst.tracker.Shut() // as if the sandbox were expiring
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		for _, call := range []func(){
			func() {
				if u, err := h.Use(t.Context(), s.ID); err == nil {
					u.End()
					t.Error("a sandbox was used although its tracker is shut")
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
		for range 100 { // callers do not know that the host is closed
			_, _ = h.Use(t.Context(), s.ID)
		}
		close(stop)
		wg.Wait()
	}()
	select {
	case <-done:
	case <-time.After(await.Hang):
		buf := make([]byte, 1<<20)
		t.Fatalf("the callers hang:\n%s", buf[:runtime.Stack(buf, true)])
	}
}

// TestRandomLives lets many callers make random calls while steps fail at random and agents
// restart. In the end, no machine, slot or file may be left.
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
					h.randomCall(rng, ids, templates, &known)
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

func (h *host) randomCall(rng *rand.Rand, ids, templates []uuid.UUID, known *lives) {
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
			case <-time.After(time.Duration(rng.IntN(30)) * time.Millisecond): // real time: a use of random length
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
		h.randomChange(ctx, n-6, id, template)
	}
}

// lives records the last count of each sandbox.
type lives struct {
	mu    sync.Mutex
	known map[uuid.UUID]life
}

type life struct {
	born   time.Time
	count  byte
	deaths int // how many of its machines had died before this count
}

// use counts once in a sandbox. The count must continue, or start at 1 if a machine of the
// sandbox died since the last count.
func (l *lives) use(h *host, u *Use) {
	l.mu.Lock()
	defer l.mu.Unlock()
	vm := u.VM.(*worldVM) // its id is not the sandbox's if it was a warm machine
	h.w.mu.Lock()
	deaths := h.w.deaths[vm.spec.ID]
	h.w.mu.Unlock()
	n, ok := vm.count()
	if !ok {
		return
	}
	last, ok := l.known[u.ID]
	if lost := deaths > last.deaths && n == 1; ok && last.born.Equal(u.CreatedAt) && n != last.count+1 && !lost {
		h.w.t.Errorf("%s counted to %d, and before that to %d", u.ID, n, last.count)
	}
	l.known[u.ID] = life{u.CreatedAt, n, deaths}
}

// randomChange makes a random call that saves a sandbox or starts one from saved state.
func (h *host) randomChange(ctx context.Context, n int, id, template uuid.UUID) {
	switch n {
	case 0, 1:
		_, _ = h.Pause(ctx, id)
	case 2, 3:
		_, _ = h.Resume(ctx, id)
	case 4:
		_, _ = h.Snapshot(ctx, id, template, "", nil)
	case 5:
		_ = h.DeleteTemplate(uuid.Nil, template)
	case 6:
		copies := []Copy{{uuid.New(), "x"}, {uuid.New(), "y"}}
		if _, err := h.Fork(ctx, id, copies); err == nil {
			for _, c := range copies {
				if err := h.Destroy(context.Background(), c.ID); err != nil && !errors.Is(err, errInjected) {
					h.w.t.Errorf("destroy a fork: %v", err)
				}
			}
		}
	}
}
