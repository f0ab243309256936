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

	"github.com/wrenn-dev/wrenn/internal/layout"
)

// Template is what a sandbox starts from.
type Template struct {
	ID        uuid.UUID `json:"id"`
	Team      uuid.UUID `json:"team"`
	Name      string    `json:"name"`
	DiskMiB   int       `json:"disk_mib"` // size of the file system
	CreatedAt time.Time `json:"created_at"`
	Inputs    string    `json:"inputs"` // digest of what it was made from
	// Of a template that was captured from a sandbox; else 0: any.
	VCPUs     int `json:"vcpus,omitempty"`
	MemoryMiB int `json:"memory_mib,omitempty"`

	Defaults Defaults `json:"defaults,omitzero"`
	// Start is a command, which no shell reads, that is started when the
	// template is booted to be captured, and left running; empty: none.
	Start []string `json:"start,omitempty"`

	// Rootfs is the path of the raw ext4 file system, sparse.
	Rootfs string `json:"-"`
	// SizeBytes is what the template takes on disk. Files that it shares with
	// others count for each.
	SizeBytes int64 `json:"-"`
}

// Defaults are what the processes of a template's sandboxes have unless they
// or their sandbox say otherwise.
type Defaults struct {
	Envs map[string]string `json:"envs,omitempty"`
	// User is a name or a number, and perhaps a group behind a colon; empty: the
	// guest daemon's own default.
	User string `json:"user,omitempty"`
	// Workdir is where processes start; empty: in their user's home.
	Workdir string `json:"workdir,omitempty"`
}

// The names of a template's files.
const (
	rootfsFile   = "rootfs.ext4"
	templateFile = "template.json"
)

// Load returns every template below dir. A folder without a readable record
// is an error: it was published whole.
func Load(dir layout.Dir) ([]Template, error) {
	teams, err := os.ReadDir(dir.Images())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	var all []Template
	for _, t := range teams {
		team, err := uuid.Parse(t.Name())
		if err != nil {
			continue
		}
		entries, err := os.ReadDir(filepath.Join(dir.Images(), t.Name()))
		if err != nil {
			return nil, fmt.Errorf("list templates: %w", err)
		}
		for _, e := range entries {
			id, err := uuid.Parse(e.Name())
			if err != nil || strings.HasPrefix(e.Name(), tmpPrefix) {
				continue
			}
			tpl, err := read(dir, team, id)
			if errors.Is(err, fs.ErrNotExist) {
				if _, err := os.Stat(dir.Template(team, id)); errors.Is(err, fs.ErrNotExist) {
					continue // deleted meanwhile
				}
			}
			if err != nil {
				return nil, err
			}
			all = append(all, tpl)
		}
	}
	return all, nil
}

// Find returns a template, or an error that is [fs.ErrNotExist].
func Find(dir layout.Dir, team, id uuid.UUID) (Template, error) { return read(dir, team, id) }

// read reads the record of one template. Its ids are those of its folder.
func read(dir layout.Dir, team, id uuid.UUID) (Template, error) {
	home := dir.Template(team, id)
	b, err := os.ReadFile(filepath.Join(home, templateFile))
	if err != nil {
		return Template{}, fmt.Errorf("read template: %w", err)
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

// size is what a folder's files take on disk, each of them once.
func size(dir string) (int64, error) {
	var sum int64
	seen := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil || !d.Type().IsRegular() {
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
		sum += allocated(info)
		return nil
	})
	return sum, err
}

// write writes the record of t to the folder home.
func (t Template) write(home string) error {
	b, err := json.MarshalIndent(t, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(home, templateFile), b, 0o644)
}
