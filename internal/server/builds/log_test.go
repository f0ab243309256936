package builds

import (
	"bytes"
	"testing"
	"unicode/utf8"

	"github.com/wrenn-dev/wrenn/internal/linear"
)

// TestLogIsBounded checks that a build's log keeps a bounded amount of output in total,
// and each step's end.
func TestLogIsBounded(t *testing.T) {
	prints := map[string][]byte{
		"text":            bytes.Repeat([]byte("0123456789abcde\n"), maxOutput/8),
		"NULs":            make([]byte, 2*maxOutput),
		"broken UTF-8":    bytes.Repeat([]byte{'a', 0xff}, maxOutput),
		"wide characters": bytes.Repeat([]byte("aé漢🐦"), maxOutput/4),
	}
	for what, text := range prints {
		steps := make([]Step, maxSteps)
		all := 0
		for i := range steps {
			out := newOutput(steps[:i])
			if i < 2*maxLog/maxOutput || i == maxSteps-1 { // the other steps would find no room either
				_, _ = out.Write(text)
			}
			out.fill(&steps[i])
			s := &steps[i]
			if len(s.Output) > maxOutput || len(s.Tail) > maxTail || !utf8.ValidString(s.Output) || !utf8.ValidString(s.Tail) {
				t.Fatalf("%s: step %d has %d and %d bytes", what, i, len(s.Output), len(s.Tail))
			}
			all += len(s.Output)
		}
		if first := &steps[0]; len(first.Output) < maxOutput-utf8.UTFMax || !first.Truncated {
			t.Errorf("%s: the first step has %d bytes, truncated is %v", what, len(first.Output), first.Truncated)
		}
		if last := &steps[maxSteps-1]; all > maxLog || !last.Truncated || len(last.Tail) < maxTail-utf8.UTFMax {
			t.Errorf("%s: the log has %d bytes, its last step %d, truncated is %v", what, all, len(last.Tail), last.Truncated)
		}
	}
	// The database counts this much for an unmeasured log: the outputs, one more for
	// START, each step's tail and 1 KiB, and the recipe's text.
	const counts, recipe = 16 << 20, 1_000_000
	if most := maxLog + maxOutput + maxSteps*(maxTail+1024) + recipe; most > counts {
		t.Errorf("a log can take %d bytes, and counts %d", most, counts)
	}
}

// TestOutputIsLinear checks that twice as much output of a step takes twice as long,
// however small its pieces.
func TestOutputIsLinear(t *testing.T) {
	linear.Check(t, "output of a step", 1<<18, func(n int) {
		o := newOutput(nil)
		for range n {
			_, _ = o.Write([]byte("x"))
		}
		var s Step
		if o.fill(&s); len(s.Output) != maxOutput || !s.Truncated {
			t.Errorf("%d bytes are kept, truncated %v", len(s.Output), s.Truncated)
		}
	})
}
