// Package atomicfile writes small files atomically: a crash at any moment leaves either
// the old content or the new.
package atomicfile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Write replaces or creates the file at path with the given permissions. If it returns
// nil, the content survives a power failure. If it fails, the file has either the old
// content or the new.
func Write(path string, content []byte, perm fs.FileMode) error {
	return write(path, content, perm, replace|durable)
}

// WriteJSON is [Write] of v as indented JSON, which only the owner may read.
func WriteJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return Write(path, append(b, '\n'), 0o600)
}

// WriteNoSync is [Write] without waiting for the disk: the content survives
// this process, but a power failure may leave the old content.
func WriteNoSync(path string, content []byte, perm fs.FileMode) error {
	return write(path, content, perm, replace)
}

// Create is [Write] for a file that must not exist yet; if it does, the error
// is [fs.ErrExist].
func Create(path string, content []byte, perm fs.FileMode) error {
	return write(path, content, perm, durable)
}

// Sync makes the content of a file, or the names in a directory, survive a
// power failure.
func Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// The name of a temporary file is the prefix, the name of the file to write, and a
// suffix.
const (
	tempPrefix = "."
	tempSuffix = ".tmp-"
)

// IsTemporary reports whether name, without its directory, is that of a temporary file
// of this package. A killed writer leaves one.
func IsTemporary(name string) bool {
	return strings.HasPrefix(name, tempPrefix) && strings.Contains(name, tempSuffix)
}

// Sweep removes temporary files that killed writers of path left beside it, as far as it
// can. Nothing may write path at the same time.
func Sweep(path string) error {
	return sweep(filepath.Dir(path), tempPrefix+filepath.Base(path)+tempSuffix)
}

// SweepDir is [Sweep] for every file in dir.
func SweepDir(dir string) error { return sweep(dir, "") }

func sweep(dir, prefix string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if IsTemporary(e.Name()) && strings.HasPrefix(e.Name(), prefix) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	if err != nil {
		return fmt.Errorf("remove unfinished files: %w", err)
	}
	return nil
}

type mode int

const (
	replace mode = 1 << iota // the file may exist
	durable                  // wait for the disk
)

// fault, which only tests set, makes a step fail.
var fault = func(step string) error { return nil }

func write(path string, content []byte, perm fs.FileMode, how mode) error {
	tmp, err := writeTemp(path, content, perm, how&durable != 0)
	if err != nil {
		return err
	}
	if how&replace != 0 {
		err = do("rename", func() error { return os.Rename(tmp, path) })
		if err != nil {
			return errors.Join(err, os.Remove(tmp))
		}
	} else {
		err = do("link", func() error { return os.Link(tmp, path) })
		if err = errors.Join(err, os.Remove(tmp)); err != nil {
			return err
		}
	}
	if how&durable == 0 {
		return nil
	}
	err = do("sync directory", func() error { return Sync(filepath.Dir(path)) })
	if err != nil && how&replace == 0 {
		return errors.Join(err, os.Remove(path)) // so that the caller can retry
	}
	return err
}

// writeTemp writes a new file beside path.
func writeTemp(path string, content []byte, perm fs.FileMode, durable bool) (name string, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), tempPrefix+filepath.Base(path)+tempSuffix)
	if err != nil {
		return "", err
	}
	err = do("write", func() error {
		_, err := f.Write(content)
		return errors.Join(err, f.Chmod(perm))
	})
	if err == nil && durable {
		// Before the rename: otherwise a power failure could leave the new name
		// without its content.
		err = do("sync", f.Sync)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}

func do(step string, f func() error) error {
	if err := fault(step); err != nil {
		return err
	}
	return f()
}
