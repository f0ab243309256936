package linear

import (
	"strings"
	"testing"
)

var (
	kept  string
	found int
)

// TestCheck checks that code that copies or searches everything at each step is found,
// and code that doubles its room is not.
func TestCheck(t *testing.T) {
	Check(t, "strings.Builder", 1<<17, func(n int) {
		var b strings.Builder
		for range n {
			b.WriteString("0123456789")
		}
		kept = b.String()
	})
	took := map[int]uint64{}
	for _, n := range []int{1000, 2000} {
		took[n] = allocated(func() {
			kept = ""
			for range n {
				kept += "0123456789"
			}
		})
	}
	if took[2000] <= 3*took[1000] {
		t.Errorf("a concatenation allocates %d and %d bytes, which Check accepts as linear", took[1000], took[2000])
	}
	text := strings.Repeat("x", 1<<17)
	short, long, ok := grows(len(text)/4, func(n int) {
		for range n {
			found += strings.Count(text[:n], "y")
		}
	})
	if ok {
		t.Errorf("a search of all for each takes %v and %v, which Check accepts as linear", short, long)
	}
}
