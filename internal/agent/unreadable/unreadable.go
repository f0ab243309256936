// Package unreadable keeps what the agent finds on disk and cannot read. The
// agent never deletes such data: it moves it to one directory, where an
// operator can look at it and put it back.
package unreadable

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// Kind is the kind of data that could not be read.
type Kind string

// The kinds.
const (
	Sandbox     Kind = "sandbox"
	Template    Kind = "template"
	Capture     Kind = "capture"
	Journal     Kind = "journal"
	Credentials Kind = "credentials"
)

// Kinds returns every kind.
func Kinds() []Kind { return []Kind{Sandbox, Template, Capture, Journal, Credentials} }

// Item is data that was moved.
type Item struct {
	Kind Kind `json:"kind"`
	// Path is where it is now, From where it was.
	Path   string    `json:"path"`
	From   string    `json:"from"`
	Reason string    `json:"reason"`
	Time   time.Time `json:"time"`
}

// noteSuffix ends the name of the file that describes the item beside it.
const noteSuffix = ".note"

// Move moves the file or directory at path to the directory of unreadable data
// and notes why. It is durable when Move returns.
func Move(dir layout.Dir, kind Kind, path string, reason error) (Item, error) {
	item, err := move(dir, kind, path, reason)
	if err != nil {
		return Item{}, fmt.Errorf("set unreadable %s aside: %w", kind, err)
	}
	return item, nil
}

func move(dir layout.Dir, kind Kind, path string, reason error) (Item, error) {
	if err := os.MkdirAll(dir.Unreadable(), 0o700); err != nil {
		return Item{}, err
	}
	item := Item{Kind: kind, From: path, Reason: reason.Error(), Time: time.Now().UTC()}
	var err error
	if item.Path, err = free(dir.Unreadable(), string(kind)+"-"+filepath.Base(path)); err != nil {
		return Item{}, err
	}
	// The note first: after a crash in between, a note alone means nothing.
	if err := atomicfile.WriteJSON(item.Path+noteSuffix, item); err != nil {
		return Item{}, err
	}
	if err := os.Rename(path, item.Path); err != nil {
		return Item{}, errors.Join(err, os.Remove(item.Path+noteSuffix))
	}
	return item, errors.Join(atomicfile.Sync(dir.Unreadable()), atomicfile.Sync(filepath.Dir(path)))
}

// Passing reports whether an error of reading says nothing about what is on disk,
// as those of a disk that fails and of too many open files do. Such data is not for
// Move: it is there, and may be read later.
func Passing(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && errno != syscall.ENOENT && errno != syscall.EISDIR && errno != syscall.ENOTDIR
}

// free returns a path in parent that nothing has, like name.
func free(parent, name string) (string, error) {
	path := filepath.Join(parent, name)
	for n := 2; ; n++ {
		_, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return path, nil
		}
		if err != nil {
			return "", err
		}
		path = filepath.Join(parent, fmt.Sprintf("%s.%d", name, n))
	}
}

// List returns everything that was moved and is still there.
func List(dir layout.Dir) ([]Item, error) {
	entries, err := os.ReadDir(dir.Unreadable())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list unreadable data: %w", err)
	}
	var all []Item
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), noteSuffix) || atomicfile.IsTemporary(e.Name()) {
			continue
		}
		path := filepath.Join(dir.Unreadable(), e.Name())
		var item Item
		b, err := os.ReadFile(path + noteSuffix)
		if err == nil {
			err = json.Unmarshal(b, &item)
		}
		if err != nil { // it is there all the same
			kind, _, _ := strings.Cut(e.Name(), "-")
			item = Item{Kind: Kind(kind), Reason: "its note cannot be read: " + err.Error()}
		}
		item.Path = path
		all = append(all, item)
	}
	return all, nil
}
