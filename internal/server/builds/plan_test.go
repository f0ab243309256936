package builds

import (
	"archive/tar"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/linear"
	"github.com/wrenn-dev/wrenn/internal/recipe"
)

func planOf(t *testing.T, text string, index []file) (*plan, error) {
	t.Helper()
	r, err := recipe.Parse("FROM minimal\n" + text)
	if err != nil {
		t.Fatal(err)
	}
	return makePlan(r, "base", nil, index, true)
}

// files returns a folder of n files with names of a given length.
func files(n, length int) (index []file) {
	for i := range n {
		index = append(index, file{name: fmt.Sprintf("%0*d", length, i), kind: tar.TypeReg})
	}
	return index
}

// TestPlanIsBounded checks that the plan of a recipe of a megabyte, for a folder of a
// hundred thousand files, neither fills the server's memory nor keeps it busy.
func TestPlanIsBounded(t *testing.T) {
	var many strings.Builder
	for i := range 20_000 {
		fmt.Fprintf(&many, " a%d=1", i)
	}
	index := files(100_000, 40)
	long := "ENV L=" + strings.Repeat("x", 100<<10) + "\n"
	for name, tt := range map[string]struct {
		text  string
		index []file
	}{
		"many variables":      {"ENV" + many.String(), nil},
		"doubled values":      {"ENV a=xx\n" + strings.Repeat("ENV a=$a$a b=$a$a\n", 16) + "ENV a=$b$b c=$b$b d=$b$b e=$b$b", nil},
		"one variable again":  {long + "ENV" + strings.Repeat(" a=$L", 20_000), nil},
		"the folder again":    {strings.Repeat("COPY . /x/\n", 900), index},
		"many sources":        {"COPY" + strings.Repeat(" "+index[7].name[:39]+"?", 20_000) + " /x/", index},
		"many absent folders": {"COPY" + strings.Repeat(" absent", 40_000) + " /x/", index},
		"long sources":        {long + "COPY" + strings.Repeat(" $L", 20_000) + " /x/", index},
		"many stars":          {"COPY " + strings.Repeat("*0", 50_000) + " /x/", index},
	} {
		t.Run(name, func(t *testing.T) {
			var begin, end runtime.MemStats
			runtime.ReadMemStats(&begin)
			_, err := planOf(t, tt.text, tt.index)
			runtime.ReadMemStats(&end)
			var wrong *recipe.Error
			if !errors.As(err, &wrong) {
				t.Errorf("error %v, want a *recipe.Error", err)
			}
			if took := (end.TotalAlloc - begin.TotalAlloc) >> 20; took > 512 {
				t.Errorf("a plan allocates %d MiB", took)
			}
		})
	}
}

// TestPlanIsLinear checks that twice the files, or twice the steps, take twice as long.
func TestPlanIsLinear(t *testing.T) {
	plans := func(text string, index []file) {
		t.Helper()
		if _, err := planOf(t, text, index); err != nil {
			t.Error(err)
		}
	}
	linear.Check(t, "files", 10_000, func(n int) { plans("COPY . /x/", files(n, 20)) })
	linear.Check(t, "steps", 200, func(n int) { plans(strings.Repeat("ENV a=1\n", n), nil) })
	linear.Check(t, "patterns", 20, func(n int) { plans("COPY"+strings.Repeat(" *1", n)+" /x/", files(1000, 20)) })
}

// TestCopySelects copies literal names, patterns, links, and folders with and without an
// entry.
func TestCopySelects(t *testing.T) {
	index := []file{
		{name: "a", kind: tar.TypeReg},
		{name: "b*", kind: tar.TypeReg},
		{name: "bc", kind: tar.TypeReg},
		{name: "d", kind: tar.TypeDir},
		{name: "d/x", kind: tar.TypeReg},
		{name: "l", link: "d", kind: tar.TypeSymlink},
		{name: "left/out", kind: tar.TypeReg},
	}
	for source, want := range map[string]string{
		"a":        "a>a ",
		`b\\*`:     "b*>b* ",
		"b*":       "b*>b* bc>bc ",
		"d":        "d/x>x ",
		"d/":       "d/x>x ",
		"l":        "d/x>x ",
		"left":     "left/out>out ",
		"left/*":   "left/out>out ",
		".":        "a>a b*>b* bc>bc d>d d/x>d/x l>l left/out>left/out ",
		"[":        "error",
		"absent":   "error",
		"absent/*": "error",
	} {
		p, err := planOf(t, "COPY "+source+" /x/", index)
		got := ""
		if err != nil {
			got = "error"
		} else {
			s := p.actions[0].files
			for _, e := range index {
				for _, to := range s.to[e.name] {
					got += e.name + ">" + to + " "
				}
			}
		}
		if got != want {
			t.Errorf("COPY %s takes %q, want %q (%v)", source, got, want, err)
		}
	}
}
