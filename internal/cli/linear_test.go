package cli

import (
	"io"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/linear"
)

// TestJSONIsLinear checks that twice as many characters to escape take twice as long.
func TestJSONIsLinear(t *testing.T) {
	a := &app{streams: streams{out: &filter{to: io.Discard}}}
	linear.Check(t, "json", 20_000, func(n int) {
		if err := a.json(strings.Repeat("\u009b", n)); err != nil {
			t.Fatal(err)
		}
	})
}
