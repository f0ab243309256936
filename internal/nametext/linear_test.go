package nametext

import (
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/linear"
)

func TestNamesAreLinear(t *testing.T) {
	linear.Check(t, "names", 1<<18, func(n int) {
		if name := strings.Repeat("\xff", n); Name(Text(name)) != name {
			t.Error("a name changed on the way")
		}
	})
}
