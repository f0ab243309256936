package await

import (
	"testing"
	"time"
)

func TestScale(t *testing.T) {
	for factor, want := range map[string]time.Duration{"": time.Second, "8": 8 * time.Second, "0.5": time.Second / 2} {
		t.Setenv("WRENN_TEST_TIMEOUT_FACTOR", factor)
		if got := Scale(time.Second); got != want {
			t.Errorf("with a factor of %q a second is %v, want %v", factor, got, want)
		}
	}
	for _, bad := range []string{"x", "0", "-1"} {
		t.Setenv("WRENN_TEST_TIMEOUT_FACTOR", bad)
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("a factor of %q was accepted", bad)
				}
			}()
			Scale(time.Second)
		}()
	}
}
