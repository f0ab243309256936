package sandbox

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

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
	await.Recv(t, "the use ends with its sandbox", u.Context.Done())
	if cause := context.Cause(u.Context); !strings.Contains(cause.Error(), "destroyed") {
		t.Error(cause)
	}
	u.End()
	u.End()
	if err := h.Destroy(t.Context(), s.ID); err != nil {
		t.Errorf("the second Destroy: %v", err)
	}
	if _, err := h.Use(t.Context(), s.ID); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if p := h.Journal.Pending(); len(p) != 0 {
		t.Errorf("destroying a sandbox added the events %v", p)
	}
	h.nothingLeft()
}

func TestBadSpecs(t *testing.T) {
	h := newHost(t)
	for name, test := range map[string]struct {
		change func(*Spec)
		want   error
	}{
		"no processor":           {func(s *Spec) { s.VCPUs = 0 }, ErrInvalid},
		"too many processors":    {func(s *Spec) { s.VCPUs = MaxVCPUs + 1 }, ErrInvalid},
		"no memory":              {func(s *Spec) { s.MemoryMiB = 0 }, ErrInvalid},
		"negative memory":        {func(s *Spec) { s.MemoryMiB = -5 }, ErrInvalid},
		"too much memory":        {func(s *Spec) { s.MemoryMiB = MaxMemoryMiB + 1 }, ErrInvalid},
		"more than the host has": {func(s *Spec) { s.MemoryMiB = 4096 }, ErrExhausted},
		"small disk":             {func(s *Spec) { s.DiskMiB = 63 }, ErrInvalid},
		"huge disk":              {func(s *Spec) { s.DiskMiB = MaxDiskMiB + 1 }, ErrInvalid},
		"negative timeout":       {func(s *Spec) { s.Timeout = -time.Second }, ErrInvalid},
		"long timeout":           {func(s *Spec) { s.Timeout = MaxTimeout + 1 }, ErrInvalid},
		"no token":               {func(s *Spec) { s.Token = "" }, ErrInvalid},
		"no such template":       {func(s *Spec) { s.Template = uuid.New() }, ErrNotFound},
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

func TestMemoryAdmission(t *testing.T) {
	h := newHost(t)
	var ok, refused atomic.Int32
	var wg sync.WaitGroup
	for range 12 {
		wg.Go(func() {
			s := spec()
			s.MemoryMiB = 512 // 576 with overhead, so seven fit
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
		t.Errorf("paused sandboxes still reserve %d MiB", reserved)
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
				blamed = ErrSlow // The error does not tell whether the host or guest was slow.
			}
			for _, kind := range []error{ErrStart, ErrGuest, ErrSlow} {
				if errors.Is(err, kind) != (kind == blamed) {
					t.Errorf("error %q is of the wrong kind, want %q", err, blamed)
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
	h.w.responds = make(chan struct{}) // never healthy
	s := spec()
	created := make(chan error)
	go func() {
		_, err := h.Create(context.Background(), s)
		created <- err
	}()
	await.Until(t, "the sandbox is starting", func() bool { return h.info(s.ID).State == Starting })
	if err := h.Destroy(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	if err := <-created; !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "destroyed") {
		t.Errorf("create ended with %v", err)
	}
	close(h.w.responds) // Let the template's capture end, for which the create waited.
	h.nothingLeft()
}

// TestAbandonedCreate checks that a start ends when its last caller gives up, and not
// when the first one does.
func TestAbandonedCreate(t *testing.T) {
	h := newHost(t)
	h.w.responds = make(chan struct{})
	s := spec()
	first, leaveFirst := context.WithCancel(t.Context())
	second, leaveSecond := context.WithCancel(t.Context())
	defer leaveSecond()
	ended := make(chan error)
	go func() { _, err := h.Create(first, s); ended <- err }()
	await.Until(t, "the sandbox is starting", func() bool { return h.info(s.ID).State == Starting })
	go func() { _, err := h.Create(second, s); ended <- err }()
	inst, err := h.find(s.ID)
	if err != nil {
		t.Fatal(err)
	}
	await.Until(t, "both callers wait", func() bool {
		inst.mu.Lock()
		defer inst.mu.Unlock()
		return inst.waiters == 2
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
	close(h.w.responds) // Let the template's capture end, for which the create waited.
	h.nothingLeft()
}
