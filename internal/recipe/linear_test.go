package recipe

import (
	"runtime"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/linear"
)

// TestParseIsLinear repeats each part of the language. Without a bound, one word of a
// megabyte took the server 13 minutes.
func TestParseIsLinear(t *testing.T) {
	const from = "FROM minimal\n"
	for name, text := range map[string]func(n int) string{
		"word":              func(n int) string { return from + "ENV A=" + strings.Repeat("x", n) },
		"quoted":            func(n int) string { return from + `ENV A="` + strings.Repeat(`x\"`, n/3) + `"` },
		"words":             func(n int) string { return from + "ENV" + strings.Repeat(" A=x", n/4) },
		"variables":         func(n int) string { return from + "ENV A=" + strings.Repeat("$aa", n/3) },
		"alternatives":      func(n int) string { return from + "ENV A=" + strings.Repeat("${a:-b}", n/7) },
		"continued":         func(n int) string { return from + "RUN a" + strings.Repeat("\\\nx", n/3) },
		"continued words":   func(n int) string { return from + "ENV" + strings.Repeat(" a=1\\\n", n/6) + "b=2" },
		"comments":          func(n int) string { return from + "ENV a=1\\\n" + strings.Repeat("#\n", n/2) + "b=2" },
		"instructions":      func(n int) string { return from + strings.Repeat("ENV abcdef=12345\n", n/17) },
		"sources":           func(n int) string { return from + "COPY" + strings.Repeat(" aa", n/3) + " /" },
		"sources as a list": func(n int) string { return from + "COPY [" + strings.Repeat(`"abcd",`, n/7) + `"/"]` },
		"mistakes":          func(n int) string { return from + strings.Repeat("X\n", n/2) },
		"no here-document":  func(n int) string { return from + "RUN" + strings.Repeat(" 1<", n/3) },
	} {
		linear.Check(t, name, MaxSize/32, func(n int) {
			r, err := Parse(text(n))
			if err != nil && (name != "mistakes" || len(err.Error()) > 64<<10) {
				t.Fatalf("%s: %.200s", name, err)
			}
			if err == nil && len(r.String()) > 8*n+1000 {
				t.Errorf("%s: %d bytes expand to %d", name, n, len(r.String()))
			}
		})
	}
	if _, err := Parse(from + strings.Repeat("X\n", 1000)); len(err.(Errors)) != maxErrors {
		t.Errorf("it reports %d mistakes", len(err.(Errors)))
	}
}

// TestParseTakesBoundedMemory checks that parsing a recipe of the maximum size takes at
// most a few dozen times that, whatever its content.
func TestParseTakesBoundedMemory(t *testing.T) {
	for _, what := range []string{"\nRUN a", " a", "$a ", `"",`, "${a:-b}", "\\\n", "\nX", "\nCOPY a b", ",", "\nENV a=1 b=2", "\n"} {
		for _, before := range []string{"", "FROM minimal\nENV a=", "FROM minimal\nCOPY ", "FROM minimal\nRUN [", "FROM minimal\nCOPY ["} {
			text := before + strings.Repeat(what, (MaxSize-len(before))/len(what))
			var begin, end runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&begin)
			lines, _ := split(text)
			r, err := Parse(text)
			runtime.GC()
			runtime.ReadMemStats(&end)
			if took := (int64(end.HeapAlloc) - int64(begin.HeapAlloc)) >> 20; took > 24 {
				t.Errorf("%q and many %q: %d MiB", before, what, took)
			}
			runtime.KeepAlive(lines)
			runtime.KeepAlive(r)
			runtime.KeepAlive(err)
		}
	}
}

// TestPositionsInAnyOrder checks the position of every character of a continued line, in
// any order of calls.
func TestPositionsInAnyOrder(t *testing.T) {
	lines, err := split("RUN aä b\\\n  cö\\\n#\n d\n")
	if err != nil || len(lines) != 1 {
		t.Fatal(lines, err)
	}
	l := lines[0]
	offsets := []int{len(l.text)}
	for i := range l.text {
		offsets = append(offsets, i)
	}
	want := make(map[int]string)
	for _, i := range offsets {
		fresh := &line{text: l.text, spans: l.spans}
		want[i] = fresh.position(i).String()
	}
	if got := want[0] + " " + want[strings.Index(l.text, "c")] + " " + want[strings.Index(l.text, "d")]; got != "1:1 2:3 4:2" {
		t.Error(got)
	}
	for _, first := range offsets {
		for _, second := range offsets {
			l.position(first)
			if got := l.position(second).String(); got != want[second] {
				t.Fatalf("%d after %d: at %s, want %s", second, first, got, want[second])
			}
		}
	}
}
