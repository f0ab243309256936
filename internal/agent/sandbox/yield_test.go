package sandbox

import (
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
)

// yielder records what it is told of each machine, and fails for one of them.
type yielder struct {
	told  map[uuid.UUID][]bool
	fails uuid.UUID
}

func (y *yielder) Yield(st vmm.State, s vmm.Spec, yield bool) error {
	if s.VCPUs == 0 {
		return errors.New("no processors in the spec")
	}
	y.told[st.ID] = append(y.told[st.ID], yield)
	if st.ID == y.fails {
		return errors.New("it fails")
	}
	return nil
}

// TestYield lets machines use processors more or less, one second after the other, and
// checks which of them yield. One cannot be told.
func TestYield(t *testing.T) {
	h := newHost(t)
	defer h.destroyAll()
	var homes []uuid.UUID
	for range 3 {
		s := spec()
		if _, err := h.Create(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		h.mu.Lock()
		homes = append(homes, h.sandboxes[s.ID].rec.Home)
		h.mu.Unlock()
	}
	var spent time.Duration
	d := &yielder{told: map[uuid.UUID][]bool{}, fails: homes[0]}
	y := &yielding{driver: d, spent: func(int) (time.Duration, error) { return spent, nil }}
	now := time.Now()
	for i, round := range []struct {
		processors float64
		told       []bool
	}{
		{0, []bool{false}}, // new
		{0.5, nil},
		{0.9, []bool{true}},
		{0.9, []bool{true}},
		{0.5, []bool{true}},
		{0.1, []bool{false}},
		{0.5, nil},
		{0, nil},
	} {
		clear(d.told)
		now = now.Add(time.Second)
		spent += time.Duration(round.processors * float64(time.Second))
		h.yield(y, now)
		for _, home := range homes {
			want := round.told
			if home == d.fails && want == nil {
				want = []bool{false} // again
			}
			if got := d.told[home]; !slices.Equal(got, want) {
				t.Errorf("round %d: a machine that used %g processors was told %v, not %v", i, round.processors, got, want)
			}
		}
	}
	// All yield when the agent ends.
	now, spent = now.Add(time.Second), spent+time.Second
	h.yield(y, now)
	clear(d.told)
	h.endYielding(y)
	for _, home := range homes {
		if got := d.told[home]; !slices.Equal(got, []bool{false}) {
			t.Errorf("a machine that yields when the agent ends was told %v", got)
		}
	}
	// A machine that cannot be measured is left out, and is new again afterwards.
	y.spent = func(int) (time.Duration, error) { return 0, os.ErrProcessDone }
	h.yield(y, now.Add(time.Second))
	if len(y.uses) != 0 {
		t.Errorf("%d ended machines are remembered", len(y.uses))
	}
}

// TestProcessorTime checks the kernel's clock of a process's processor time.
func TestProcessorTime(t *testing.T) {
	before, err := processorTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); time.Since(begin) < 20*time.Millisecond; { // uses a processor, unless others do
	}
	after, err := processorTime(os.Getpid())
	if err != nil || after <= before || after-before > 30*time.Second {
		t.Errorf("the process used %v, then %v: %v", before, after, err)
	}
	if _, err := processorTime(1 << 22); err == nil {
		t.Error("a process that cannot exist has used time")
	}
}
