package oci

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/linear"
)

// TestLayersAreLinear checks that an archive of twice as many entries takes twice as
// long. A folder's white-out once read the whole folder each time that a layer repeated
// it.
func TestLayersAreLinear(t *testing.T) {
	needRoot(t)
	for what, more := range map[string]func(i int) []entry{
		"layer":       func(i int) []entry { return []entry{file(fmt.Sprint("d/", i), "x")} },
		"opaque":      func(i int) []entry { return []entry{file(fmt.Sprint("d/", i), "x"), file("d/.wh..wh..opq", "")} },
		"white-out":   func(i int) []entry { return []entry{file(fmt.Sprint("d/", i), "x"), file(".wh.d", "")} },
		"links":       func(i int) []entry { return []entry{symlink(fmt.Sprint("l", i+1), fmt.Sprint("l", i)), file("x", "y")} },
		"same folder": func(int) []entry { return []entry{dir("d", 0o755)} },
	} {
		linear.Check(t, what, 200, func(n int) {
			var entries []entry
			for i := range n {
				entries = append(entries, more(i)...)
			}
			root := filepath.Join(t.TempDir(), "root")
			if err := ofLayers(t, []entry{dir("d", 0o755)}, entries).Unpack(t.Context(), root, Limits{}); err != nil {
				t.Fatal(err)
			}
			if err := os.RemoveAll(root); err != nil {
				t.Fatal(err)
			}
		})
	}
	linear.Check(t, "contents", 500, func(n int) {
		var entries []entry
		for i := range n {
			entries = append(entries, file(fmt.Sprint("blobs/", i), "x"))
		}
		if sizes, err := contents(t.Context(), bytes.NewReader(archive(t, entries))); err != nil || len(sizes) != n {
			t.Fatal(len(sizes), err)
		}
	})
}
