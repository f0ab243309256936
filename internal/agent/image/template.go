package image

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

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/sparse"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// Template is a template that is stored on this host. Sandboxes start from it.
type Template struct {
	Version   int       `json:"version"`
	ID        uuid.UUID `json:"id"`
	Team      uuid.UUID `json:"team"`
	Name      string    `json:"name"`
	DiskMiB   int       `json:"disk_mib"` // size of the file system
	CreatedAt time.Time `json:"created_at"`
	Inputs    string    `json:"inputs"` // digest of its inputs
	// The size of the VM, if the template was captured from a sandbox; otherwise 0.
	VCPUs     int `json:"vcpus,omitempty"`
	MemoryMiB int `json:"memory_mib,omitempty"`

	Defaults Defaults `json:"defaults,omitzero"`
	// Start is a command with its arguments that runs in the template's captures. It starts
	// when a machine boots to be captured (empty: none).
	Start []string `json:"start,omitempty"`

	// Rootfs is the path of the raw ext4 file system, sparse.
	Rootfs string `json:"-"`
	// SizeBytes is the template's size on disk, including files that it shares with other
	// templates.
	SizeBytes int64 `json:"-"`
	// Stale is the error that kept [EnsureMinimal] from making the newest template, if this
	// is an earlier one.
	Stale error `json:"-"`
}

// Defaults are the defaults of a template's sandboxes: for their processes, and for their
// use of the host.
type Defaults struct {
	Envs map[string]string `json:"envs,omitempty"`
	// User is a name or a number, optionally with a colon and a group (empty: the guest
	// daemon's default).
	User string `json:"user,omitempty"`
	// Workdir is the working directory of processes (empty: their user's home).
	Workdir string `json:"workdir,omitempty"`
	// Limits lower a sandbox's limits on the host's disk and network.
	Limits rates.Limits `json:"limits,omitempty"`
}

// The names of a template's files.
const (
	rootfsFile   = "rootfs.ext4"
	templateFile = "template.json"
)

// Damage is an unreadable template or capture, or an unreadable folder of them.
type Damage struct {
	Kind unreadable.Kind
	Path string
	Err  error
}

// Load returns all readable templates in dir, and the unreadable ones as damaged: since
// templates appear atomically, they cannot be unfinished.
func Load(dir layout.Dir) (all []Template, damaged []Damage, err error) {
	teams, err := os.ReadDir(dir.Images())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("list templates: %w", err)
	}
	for _, t := range teams {
		team, err := uuid.Parse(t.Name())
		if err != nil {
			continue
		}
		home := filepath.Join(dir.Images(), t.Name())
		entries, err := os.ReadDir(home)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // Delete may just have removed the folder
			damaged = append(damaged, Damage{unreadable.Template, home, fmt.Errorf("list templates: %w", err)})
		}
		for _, e := range entries {
			id, err := uuid.Parse(e.Name())
			if err != nil || strings.HasPrefix(e.Name(), tmpPrefix) {
				continue
			}
			tpl, err := read(dir, team, id)
			if errors.Is(err, fs.ErrNotExist) {
				if _, err := os.Stat(dir.Template(team, id)); errors.Is(err, fs.ErrNotExist) {
					continue // Delete has just removed it
				}
			}
			if err != nil {
				damaged = append(damaged, Damage{unreadable.Template, dir.Template(team, id), err})
				continue
			}
			all = append(all, tpl)
		}
	}
	return all, damaged, nil
}

// Examine returns all unreadable templates and captures.
func Examine(dir layout.Dir) ([]Damage, error) {
	all, damaged, err := Load(dir)
	if err != nil {
		return nil, err
	}
	for _, t := range all {
		captures := dir.Captures(t.Team, t.ID)
		entries, err := os.ReadDir(captures)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			damaged = append(damaged, Damage{unreadable.Capture, captures, fmt.Errorf("list captures: %w", err)})
		}
		for _, e := range entries {
			home := filepath.Join(captures, e.Name())
			c, err := OpenCapture(home)
			if err == nil {
				err = memory.Check(c.Memory())
			}
			if err != nil {
				damaged = append(damaged, Damage{unreadable.Capture, home, err})
			}
		}
	}
	return damaged, nil
}

// SetAside moves damaged templates and captures to the unreadable data, and continues
// after an error. It leaves those that may be readable later. Nobody else may use
// templates during the call.
func SetAside(dir layout.Dir, damaged []Damage) (items []unreadable.Item, err error) {
	for _, d := range damaged {
		if unreadable.Passing(d.Err) {
			err = errors.Join(err, fmt.Errorf("leave %s, which may be readable later: %w", d.Path, d.Err))
			continue
		}
		item, e := unreadable.Move(dir, d.Kind, d.Path, d.Err)
		if e != nil {
			err = errors.Join(err, e)
			continue
		}
		items = append(items, item)
	}
	return items, err
}

// Find returns a template. If it does not exist, the error is [fs.ErrNotExist].
func Find(dir layout.Dir, team, id uuid.UUID) (Template, error) { return read(dir, team, id) }

// read reads a template. Its ids are those of its folder, not of its record.
func read(dir layout.Dir, team, id uuid.UUID) (Template, error) {
	home := dir.Template(team, id)
	path := filepath.Join(home, templateFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return Template{}, fmt.Errorf("read template: %w", err)
	}
	if err := format.Template.CheckJSON(path, b); err != nil {
		return Template{}, err
	}
	var t Template
	if err := json.Unmarshal(b, &t); err != nil {
		return Template{}, fmt.Errorf("read template %s: %w", home, err)
	}
	t.ID, t.Team, t.Rootfs = id, team, filepath.Join(home, rootfsFile)
	if _, err := os.Stat(t.Rootfs); err != nil {
		return Template{}, fmt.Errorf("read template: %w", err)
	}
	if t.SizeBytes, err = size(home); err != nil {
		return Template{}, fmt.Errorf("read template: %w", err)
	}
	return t, nil
}

// size returns the size on disk of a folder's files, without the kernel's modules. It
// counts a file with several links once.
func size(dir string) (int64, error) {
	var sum int64
	seen := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // somebody has just removed it
		}
		if err != nil || !d.Type().IsRegular() || d.Name() == layout.Modules {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			if seen[st.Ino] {
				return nil
			}
			seen[st.Ino] = true
		}
		sum += sparse.Allocated(info)
		return nil
	})
	return sum, err
}

// write writes the record of t to the folder home.
func (t Template) write(home string) error {
	t.Version = format.Template.Version
	b, err := json.MarshalIndent(t, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(home, templateFile), b, 0o644)
}
