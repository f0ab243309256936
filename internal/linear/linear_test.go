package linear

import (
	"strings"
	"testing"
)

var kept string

// What copies all it has is found; what doubles its room is not.
func TestCheck(t *testing.T) {
	Check(t, "strings.Builder", 4096, func(n int) {
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
		t.Errorf("a concatenation allocates %d and %d bytes, which Check takes for linear", took[1000], took[2000])
	}
}
