// Package templates has the recipes of the built-in templates. Each is a folder with a
// file Recipe and the files that the recipe copies; docs/recipes.md describes the language.
// Hosts make minimal themselves. The others must be built.
package templates

import (
	"embed"
	"fmt"
	"io/fs"
)

//go:embed code-interpreter/* docker/* node/* python/*
var files embed.FS

// Minimal is the recipe of the template minimal. It starts from the distribution's
// essential packages instead of a template, so only a host can make it.
//
//go:embed minimal/Recipe
var Minimal string

// Names returns the names of the templates that can be built, sorted.
func Names() []string { return []string{"code-interpreter", "docker", "node", "python"} }

// Folder returns the folder of a template that can be built. If there is none of that
// name, the error is [fs.ErrNotExist].
func Folder(name string) (fs.FS, error) {
	if !fs.ValidPath(name) || name == "." {
		return nil, fmt.Errorf("shipped template %q: %w", name, fs.ErrNotExist)
	}
	if _, err := fs.Stat(files, name+"/Recipe"); err != nil {
		return nil, fmt.Errorf("shipped template %q: %w", name, err)
	}
	return fs.Sub(files, name)
}
