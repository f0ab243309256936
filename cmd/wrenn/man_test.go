package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// The generator of the manual pages is here because wrenn itself only needs help texts.
var manDir = flag.String("man", "", "write the manual pages to this directory")

// TestManPages writes a manual page for each command, for the Debian package.
func TestManPages(t *testing.T) {
	dir := *manDir
	if dir == "" {
		dir = t.TempDir()
	}
	root := rootCommand()
	root.InitDefaultCompletionCmd()
	root.DisableAutoGenTag = true // its date would make builds differ
	if err := doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "Wrenn", Manual: "Wrenn"}, dir); err != nil {
		t.Fatal(err)
	}
	pages := 0
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if !c.IsAvailableCommand() && c.HasParent() {
			return
		}
		pages++
		name := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".1"
		plain, _, _ := strings.Cut(c.Short, "`") // the rest is in another font
		if page, err := os.ReadFile(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		} else if !bytes.Contains(page, []byte(plain)) {
			t.Errorf("%s does not say %q", name, c.Short)
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	if pages < 40 {
		t.Errorf("there are %d pages", pages)
	}
}
