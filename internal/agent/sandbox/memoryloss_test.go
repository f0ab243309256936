package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// machine returns the machine of a sandbox that did not start from a warm one.
func (h *host) machine(id uuid.UUID) *worldVM {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	return h.w.vms[id]
}

// dieWith ends the machine with the error why, after its console printed said.
func (v *worldVM) dieWith(why error, said string) {
	v.set(func() { v.why, v.said = why, said })
	v.die()
}

// loses waits until a sandbox is paused without memory, and checks the reason.
func (h *host) loses(t *testing.T, id uuid.UUID, why condition.Reason) {
	t.Helper()
	await.Until(t, "the sandbox is paused without memory", func() bool {
		i := h.info(id)
		return i.State == Paused && i.Condition != nil
	})
	h.isReleased(t, id)
	if c := h.info(id).Condition; c.Reason != why || c.Since.IsZero() {
		t.Errorf("the condition is %+v", c)
	}
}

// mark writes to the sandbox's fake disk, and returns a check that it is still there.
func (h *host) mark(t *testing.T, id uuid.UUID) (check func()) {
	t.Helper()
	inst, err := h.find(id)
	if err != nil {
		t.Fatal(err)
	}
	disk := inst.rec.disk(h.dir, 0)
	f, err := os.OpenFile(disk, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("precious"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	return func() {
		t.Helper()
		if data, err := os.ReadFile(disk); err != nil || !strings.HasSuffix(string(data), "precious") {
			t.Errorf("the disk has changed: %v", err)
		}
	}
}

// TestMachineDies checks that a sandbox keeps its disk when its machine dies, boots from it,
// and can then be paused and forked.
func TestMachineDies(t *testing.T) {
	for _, tracks := range []bool{false, true} {
		t.Run(fmt.Sprintf("tracks %v", tracks), func(t *testing.T) {
			h := newHost(t)
			h.w.tracks = tracks
			id := h.create(t, nil)
			kept := h.mark(t, id)
			for range 3 {
				h.counts(t, id)
			}
			if _, err := h.Pause(t.Context(), id); err != nil { // leaves a saved state that will be outdated
				t.Fatal(err)
			}
			if _, err := h.Resume(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			h.counts(t, id)
			h.machine(id).die()
			h.loses(t, id, condition.Killed)
			if e := h.event(t, id); e.Kind != journal.Paused || !strings.Contains(e.Reason, "it died") {
				t.Errorf("event %+v", e)
			}
			if _, err := h.Use(t.Context(), id); !isState(err, Paused) {
				t.Errorf("use: %v", err)
			}
			if _, err := h.Snapshot(t.Context(), id, uuid.New(), "none", nil); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "lost its memory") {
				t.Errorf("snapshot: %v", err)
			}
			if i, err := h.Resume(t.Context(), id); err != nil || i.State != Running || i.Condition != nil {
				t.Fatalf("%+v %v", i, err)
			}
			kept()
			h.runs(t, id, 0) // it booted
			for n := byte(1); n < 4; n++ {
				if _, err := h.Pause(t.Context(), id); err != nil {
					t.Fatal(err)
				}
				h.isReleased(t, id)
				if _, err := h.Resume(t.Context(), id); err != nil {
					t.Fatal(err)
				}
				h.runs(t, id, n)
			}
			copied := uuid.New()
			if _, err := h.Fork(t.Context(), id, []Copy{{ID: copied, Token: "other"}}); err != nil {
				t.Fatal(err)
			}
			h.runs(t, copied, 4)
			h.runs(t, id, 4)
			kept()
			h.destroyAll()
			h.nothingLeft()
		})
	}
}

// TestReboot checks that a reboot starts a running or a paused sandbox from its disk, any
// number of times.
func TestReboot(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	kept := h.mark(t, id)
	reserved, _ := h.Memory()
	use, err := h.Use(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	for _, state := range []State{Running, Paused} {
		for range 2 {
			h.counts(t, id)
			if state == Paused {
				if _, err := h.Pause(t.Context(), id); err != nil {
					t.Fatal(err)
				}
			}
			before := h.machine(id)
			i, err := h.Reboot(t.Context(), id)
			if err != nil || i.State != Running || i.Condition != nil {
				t.Fatalf("%+v %v", i, err)
			}
			if h.machine(id) == before {
				t.Error("the sandbox still has its old machine")
			}
			kept()
			h.runs(t, id, 0)
		}
	}
	if cause := context.Cause(use.Context); !isState(cause, Resuming) {
		t.Errorf("a use from before the reboot: %v", cause)
	}
	use.End()
	if got, _ := h.Memory(); got > reserved {
		t.Errorf("%d MiB are reserved, before: %d", got, reserved)
	}
	if states, _ := filepath.Glob(filepath.Join(h.dir.Sandbox(id), "state-*")); len(states) != 2 {
		t.Errorf("states %v", states)
	}
	h.destroyAll()
	h.nothingLeft()
}

// TestRebootFails checks that the disk survives any failure, and that the next reboot
// works.
func TestRebootFails(t *testing.T) {
	for _, step := range []string{"kill", "release", "acquire", "tap", "limit", "start", "run", "die", "init"} {
		for _, from := range []State{Running, Paused} {
			t.Run(fmt.Sprintf("%s, %s", step, from), func(t *testing.T) {
				h := newHost(t)
				id := h.create(t, nil)
				kept := h.mark(t, id)
				if from == Paused {
					if _, err := h.Pause(t.Context(), id); err != nil {
						t.Fatal(err)
					}
					h.isReleased(t, id)
				}
				h.w.setFailing(map[string]float64{step: 1})
				_, err := h.Reboot(t.Context(), id)
				if err == nil && !(from == Paused && (step == "kill" || step == "release")) {
					t.Error("the reboot succeeded")
				}
				h.w.setFailing(nil)
				if i := h.info(id); err != nil && (i.State != Paused || i.Condition == nil || i.Condition.Reason != condition.Reboot) {
					t.Errorf("the sandbox is %+v", i)
				}
				if _, err := h.Reboot(t.Context(), id); err != nil {
					t.Fatal(err)
				}
				kept()
				h.runs(t, id, 0)
				h.destroyAll()
				h.nothingLeft()
			})
		}
	}
}

// TestRebootWithoutRecord checks that a reboot changes nothing if it cannot write the record.
func TestRebootWithoutRecord(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	n := h.counts(t, id)
	if err := os.Chmod(h.dir.Sandbox(id), 0o700); err != nil {
		t.Fatal(err)
	}
	away := h.dir.Sandbox(id) + ".away"
	if err := os.Rename(h.dir.Sandbox(id), away); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Reboot(t.Context(), id); err == nil {
		t.Error("the sandbox was rebooted without a record")
	}
	if err := os.Rename(away, h.dir.Sandbox(id)); err != nil {
		t.Fatal(err)
	}
	h.runs(t, id, n)
	h.destroyAll()
	h.nothingLeft()
}

// TestLossWithoutRecord ends a sandbox's machine while the agent cannot write the record. Once
// the folder is back, the same agent, or the next, must boot the sandbox from its disk.
func TestLossWithoutRecord(t *testing.T) {
	for _, next := range []bool{false, true} {
		t.Run(fmt.Sprintf("next agent %v", next), func(t *testing.T) {
			w := newWorld(t, 1)
			dir := layout.Dir(t.TempDir())
			h := w.open(dir)
			defer func() { h.close() }()
			id := h.create(t, nil)
			kept := h.mark(t, id)
			h.counts(t, id)
			if _, err := h.Pause(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			if _, err := h.Resume(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			away := dir.Sandbox(id) + ".away"
			if err := os.Rename(dir.Sandbox(id), away); err != nil {
				t.Fatal(err)
			}
			h.machine(id).die()
			await.Until(t, "the sandbox is paused", func() bool { return h.info(id).State == Paused })
			if next {
				h.close()
			}
			if err := os.Rename(away, dir.Sandbox(id)); err != nil {
				t.Fatal(err)
			}
			if next {
				h = w.open(dir)
			}
			if _, err := h.Resume(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			kept()
			h.runs(t, id, 0)
			h.destroyAll()
			h.nothingLeft()
		})
	}
}

// TestRebootNeedsTheFormat checks that a reboot fails with a clear error if the host's
// monitor uses another disk format, and that the sandbox keeps running.
func TestRebootNeedsTheFormat(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	n := h.counts(t, id)
	inst, err := h.find(id)
	if err != nil {
		t.Fatal(err)
	}
	inst.set(func() { inst.rec.DiskFormat = "other" })
	if _, err := h.Reboot(t.Context(), id); !errors.Is(err, ErrState) {
		t.Errorf("reboot: %v", err)
	}
	inst.set(func() { inst.rec.DiskFormat = "" })
	h.runs(t, id, n)
}

// TestWhyLost checks that whyLost distinguishes a guest that ran out of memory from other
// crashes.
func TestWhyLost(t *testing.T) {
	reset := &vmm.GuestEnd{Reason: "guest-reset"}
	const initDied = "[   12.3] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009\r\n[   12.4] CPU: 0 PID: 1\r\n"
	for name, test := range map[string]struct {
		err     error
		console string
		want    condition.Reason
		detail  string
	}{
		"killed":         {errors.New("QEMU was killed by SIGKILL"), "", condition.Killed, "QEMU was killed by SIGKILL"},
		"restarted":      {reset, "[ 1.0] reboot: Restarting system\r\n", condition.Restarted, ""},
		"silent":         {reset, "", condition.Restarted, ""},
		"deadlock":       {reset, "x\n[ 9.1] Kernel panic - not syncing: System is deadlocked on memory\r\nmore", condition.OOM, "Kernel panic - not syncing: System is deadlocked on memory"},
		"panic on oom":   {reset, "Kernel panic - not syncing: Out of memory: system-wide panic_on_oom is enabled\n", condition.OOM, "Kernel panic - not syncing: Out of memory: system-wide panic_on_oom is enabled"},
		"daemon killed":  {reset, "[ 12.2] Out of memory: Killed process 312 (envd) total-vm:1kB\r\n" + initDied, condition.OOM, "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009"},
		"other killed":   {reset, "[ 2.2] Out of memory: Killed process 312 (python3) total-vm:1kB\r\n" + initDied, condition.Crashed, "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009"},
		"long ago":       {reset, "[ 2.2] Out of memory: Killed process 312 (envd)\r\n" + strings.Repeat("hello\n", 1000) + initDied, condition.Crashed, "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009"},
		"crashed":        {reset, "[ 3.0] Kernel panic - not syncing: sysrq triggered crash\n", condition.Crashed, "Kernel panic - not syncing: sysrq triggered crash"},
		"the last panic": {reset, "Kernel panic - not syncing: a joke\n" + strings.Repeat(".\n", 2000) + "Kernel panic - not syncing: System is deadlocked on memory\n", condition.OOM, "Kernel panic - not syncing: System is deadlocked on memory"},
		"terminal codes": {reset, "Kernel panic - not syncing: \x1b[31mred\x00\n", condition.Crashed, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got := whyLost(test.err, test.console)
			if got.Reason != test.want || test.detail != "" && got.Detail != test.detail || strings.ContainsAny(got.Detail, "\x1b\x00") {
				t.Errorf("got %+v", got)
			}
		})
	}
}

// TestGuestOutOfMemory checks that the console output of a crashed guest decides the condition
// and the event of its sandbox.
func TestGuestOutOfMemory(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	h.machine(id).dieWith(&vmm.GuestEnd{Reason: "guest-reset"}, "Kernel panic - not syncing: System is deadlocked on memory\n")
	h.loses(t, id, condition.OOM)
	if e := h.event(t, id); e.Kind != journal.Paused || !strings.Contains(e.Reason, "the guest ran out of memory") {
		t.Errorf("event %+v", e)
	}
	h.destroyAll()
	h.nothingLeft()
}

// TestSilentGuest checks that the agent notices a guest that does not respond, after a
// failed request or without one, and that this affects no other sandbox. The condition
// ends when the guest responds.
func TestSilentGuest(t *testing.T) {
	for name, every := range map[string]time.Duration{"a request fails": time.Hour, "no request": 50 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.probing = probing{every: every, timeout: 200 * time.Millisecond, first: 20 * time.Millisecond, last: 50 * time.Millisecond, after: 300 * time.Millisecond}
			id, other := h.create(t, nil), h.create(t, nil)
			vm := h.machine(id)
			hung := make(chan struct{})
			vm.set(func() { vm.responds = hung })
			if every == time.Hour {
				u, err := h.Use(t.Context(), id)
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(u.Context, 100*time.Millisecond)
				if _, err := u.Guest.Metrics(ctx); err == nil {
					t.Error("the hung guest responded")
				}
				cancel()
				u.End()
			}
			begun := time.Now()
			await.Until(t, "the agent notices", func() bool { return h.info(id).Condition != nil })
			i := h.info(id)
			if i.State != Running || i.Condition.Reason != condition.NoAnswer || time.Since(i.Condition.Since) > time.Since(begun)+time.Minute {
				t.Errorf("the sandbox is %+v", i)
			}
			if c := h.info(other).Condition; c != nil {
				t.Errorf("the other sandbox has the condition %+v", c)
			}
			h.counts(t, other)
			close(hung)
			await.Until(t, "the guest responds again", func() bool { return h.info(id).Condition == nil })
			h.destroyAll()
			h.nothingLeft()
		})
	}
}

// TestSilentGuestReboots checks that a guest that does not respond does not delay its
// reboot.
func TestSilentGuestReboots(t *testing.T) {
	h := newHost(t)
	h.probing = probing{every: 20 * time.Millisecond, timeout: 100 * time.Millisecond, first: 20 * time.Millisecond, last: 50 * time.Millisecond, after: 100 * time.Millisecond}
	id := h.create(t, nil)
	vm := h.machine(id)
	vm.set(func() { vm.responds = make(chan struct{}) })
	await.Until(t, "the agent notices", func() bool { return h.info(id).Condition != nil })
	i, err := h.Reboot(t.Context(), id)
	if err != nil || i.State != Running || i.Condition != nil {
		t.Fatalf("%+v %v", i, err)
	}
	for _, s := range i.Steps {
		if s.Name == "settle" {
			t.Error("the reboot waited for a guest that does not respond")
		}
	}
	h.runs(t, id, 0)
	h.destroyAll()
	h.nothingLeft()
}

// TestSilenceWhileHeld checks that a guest that is stopped for a capture does not count
// as not responding.
func TestSilenceWhileHeld(t *testing.T) {
	h := newHost(t)
	h.probing = probing{every: 10 * time.Millisecond, timeout: 50 * time.Millisecond, first: 10 * time.Millisecond, last: 10 * time.Millisecond, after: 20 * time.Millisecond}
	id := h.create(t, nil)
	inst, vm := h.instance(t, id), h.machine(id)
	held, release, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- inst.order(t.Context(), func(ctx context.Context) error {
			if err := inst.vm.Hold(ctx); err != nil {
				return err
			}
			close(held)
			<-release
			return inst.vm.Run(ctx)
		})
	}()
	await.Recv(t, "the guest is held", held)
	// The second failed probe of a running guest would count, and the agent sends a third
	// only after it has judged the second.
	before := vm.unanswered.Load()
	await.Until(t, "three probes of the held guest fail", func() bool { return vm.unanswered.Load() >= before+3 })
	if c := inst.info().Condition; c != nil {
		t.Errorf("the sandbox has the condition %+v", *c)
	}
	close(release)
	if err := await.Recv(t, "the order ends", ended); err != nil {
		t.Error(err)
	}
}

// TestRebootChangesModules checks that a sandbox that boots from its disk gets the host's
// current kernel, and keeps that kernel's modules for as long as its memory lasts.
func TestRebootChangesModules(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	kernel := func(name string) string {
		path := filepath.Join(dir.Kernels(), name)
		if err := errors.Join(os.MkdirAll(dir.Kernels(), 0o755), os.WriteFile(path, []byte(name), 0o444)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	w.modules = kernel("old")
	h := w.open(dir)
	id := h.create(t, nil)
	h.close()
	w.modules = kernel("new")
	h = w.open(dir)
	defer func() { h.close() }()
	check := func(want string) {
		t.Helper()
		if got, err := os.ReadFile(h.modules(t, id)); err != nil || string(got) != want {
			t.Errorf("the sandbox has the modules %q, %v", got, err)
		}
	}
	check("old")
	if _, err := h.Reboot(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	check("new")
	w.modules = kernel("newer")
	h.close()
	h = w.open(dir)
	if _, err := h.Pause(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	h.isReleased(t, id)
	if _, err := h.Resume(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	check("new")
	h.destroyAll()
	h.nothingLeft()
}
