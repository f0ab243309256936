// Package unreadable keeps data that the agent found on disk but cannot read. The agent
// never deletes such data. It moves it to one directory, where an operator can inspect
// it and put it back.
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

// noteSuffix is the suffix of the file that describes an item, beside that item.
const noteSuffix = ".note"

// Move moves the file or directory at path to the directory of unreadable data and
// notes the reason beside it. Both are synced when Move returns.
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
	// The note first, because List ignores a note without data after a crash.
	if err := atomicfile.WriteJSON(item.Path+noteSuffix, item); err != nil {
		return Item{}, err
	}
	if err := os.Rename(path, item.Path); err != nil {
		return Item{}, errors.Join(err, os.Remove(item.Path+noteSuffix))
	}
	return item, errors.Join(atomicfile.Sync(dir.Unreadable()), atomicfile.Sync(filepath.Dir(path)))
}

// Passing reports whether a read error says nothing about the data itself, like those of
// a failing disk or of too many open files. A later read may succeed, so the caller must
// not Move such data.
func Passing(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && errno != syscall.ENOENT && errno != syscall.EISDIR && errno != syscall.ENOTDIR
}

// free returns an unused path in parent: name, or name with a number.
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
		if err != nil { // list it without its note
			kind, _, _ := strings.Cut(e.Name(), "-")
			item = Item{Kind: Kind(kind), Reason: "cannot read its note: " + err.Error()}
		}
		item.Path = path
		all = append(all, item)
	}
	return all, nil
}
