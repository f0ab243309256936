package format

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	f := Format{Name: "thing", Oldest: 1, Version: 3}
	for version := 1; version <= 3; version++ {
		if err := f.Check("file", version); err != nil {
			t.Error(err)
		}
	}
	var newer *NewerError
	err := f.CheckJSON("/data/file", []byte(`{"version": 4, "other": [1]}`))
	if !errors.As(err, &newer) {
		t.Fatalf("the error is %v", err)
	}
	for _, says := range []string{"/data/file", "version 4", "up to 3", "nothing was changed"} {
		if !strings.Contains(err.Error(), says) {
			t.Errorf("%q does not say %q", err, says)
		}
	}
	for _, text := range []string{`{}`, `{`, `[]`, ``, `{"version": "4"}`} {
		if err := f.CheckJSON("file", []byte(text)); err == nil || errors.As(err, &newer) {
			t.Errorf("of %q the error is %v", text, err)
		}
	}
}

// TestDocumented checks that docs/upgrade.md lists the versions of exactly the existing
// formats.
func TestDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "..", "docs", "upgrade.md"))
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for _, f := range All() {
		var read []string
		for v := f.Oldest; v <= f.Version; v++ {
			if v == 0 {
				read = append(read, "0 (without a version)")
				continue
			}
			read = append(read, fmt.Sprint(v))
		}
		fmt.Fprintf(&want, "| %s | `%s` | %d | %s |\n", f.Name, f.File, f.Version, strings.Join(read, ", "))
	}
	_, rest, _ := strings.Cut(string(page), "| --- | --- | --- | --- |\n")
	table, _, _ := strings.Cut(rest, "\n\n")
	if table+"\n" != want.String() {
		t.Errorf("docs/upgrade.md has\n%s\nand should have\n%s", table, want.String())
	}
}
