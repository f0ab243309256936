package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
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

	// Rootfs is the path of the raw ext4 file system, sparse.
	Rootfs string `json:"-"`
	// SizeBytes is what Rootfs takes on disk.
	SizeBytes int64 `json:"-"`
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
			if err != nil {
				return nil, err
			}
			all = append(all, tpl)
		}
	}
	return all, nil
}

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
	info, err := os.Stat(t.Rootfs)
	if err != nil {
		return Template{}, fmt.Errorf("read template: %w", err)
	}
	t.SizeBytes = allocated(info)
	return t, nil
}

// write writes the record of t to the folder home.
func (t Template) write(home string) error {
	b, err := json.MarshalIndent(t, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(home, templateFile), b, 0o644)
}
