// Package templates has the recipes of the templates that Wrenn ships. Each is
// a folder with a file Recipe and what this copies; docs/recipes.md has the
// language. Hosts make minimal themselves; the others are built.
package templates

import (
	"embed"
	"fmt"
	"io/fs"
)

//go:embed code-interpreter/* docker/* node/* python/*
var files embed.FS

// Minimal is the recipe that hosts make the template minimal of, which begins
// with what no template has: the distribution's essential packages.
//
//go:embed minimal/Recipe
var Minimal string

// Names are those of the templates that can be built, in order.
func Names() []string { return []string{"code-interpreter", "docker", "node", "python"} }

// Folder is the folder of a template that can be built, or an error that is [fs.ErrNotExist].
func Folder(name string) (fs.FS, error) {
	if !fs.ValidPath(name) || name == "." {
		return nil, fmt.Errorf("shipped template %q: %w", name, fs.ErrNotExist)
	}
	if _, err := fs.Stat(files, name+"/Recipe"); err != nil {
		return nil, fmt.Errorf("shipped template %q: %w", name, err)
	}
	return fs.Sub(files, name)
}
