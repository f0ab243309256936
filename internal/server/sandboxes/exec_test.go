package sandboxes

import (
	"bytes"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/linear"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
)

// Output is kept whole up to its bounds, and never without memory for it.
func TestKept(t *testing.T) {
	memory := budget.New(budget.Share * 2 * outputCost * maxOutput)
	for name, piece := range map[string][]byte{"byte by byte": []byte("x"), "in pieces": bytes.Repeat([]byte("0123456789"), 5000)} {
		k := kept{held: memory.Hold("a team")}
		var all []byte
		for len(all) < 300<<10 {
			k.add(piece)
			all = append(all, piece...)
			if int64(k.bytes) > memory.Used()+budget.Free {
				t.Fatalf("%s: %d bytes are kept, %d held", name, k.bytes, memory.Used())
			}
		}
		if !bytes.Equal(k.joined(), all) || k.dropped {
			t.Errorf("%s: %d of %d bytes are kept, dropped %v", name, len(k.joined()), len(all), k.dropped)
		}
		k.held.Release()
	}
	k := kept{held: memory.Hold("a team")}
	k.add(make([]byte, maxOutput-1))
	k.add([]byte("ab"))
	k.add([]byte("c"))
	if got := k.joined(); len(got) != maxOutput || got[maxOutput-1] != 'a' || !k.dropped {
		t.Errorf("%d bytes are kept, dropped %v", len(got), k.dropped)
	}
	// What other requests hold is not there for this one, but for what is short.
	for range 2 {
		late := kept{held: memory.Hold("a team")}
		late.add(make([]byte, maxOutput))
		k = late
	}
	if !k.dropped || k.bytes >= maxOutput {
		t.Errorf("%d bytes are kept without memory for them", k.bytes)
	}
	short := kept{held: memory.Hold("a team")}
	if short.add(make([]byte, budget.Free)); short.dropped || short.bytes != budget.Free {
		t.Errorf("%d bytes of a short output are kept", short.bytes)
	}
}

func TestKeptIsLinear(t *testing.T) {
	memory := budget.New(1 << 40)
	linear.Check(t, "kept", 100_000, func(n int) {
		k := kept{held: memory.Hold("a team")}
		for range n {
			k.add([]byte("x"))
		}
		k.joined()
	})
}
