package image

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// Capture is the state of a captured machine: a folder with everything needed to restore
// it. docs/formats.md describes its files. They are immutable, and other folders have
// links to them.
type Capture struct {
	Version int `json:"version"`
	// ID identifies the capture, whatever folder links to it.
	ID uuid.UUID `json:"id"`
	// Kind is the driver's kind, see vmm.Driver.
	Kind string `json:"kind"`
	// Inputs is a digest of what the machine booted from. It is empty for a capture of a
	// sandbox.
	Inputs    string `json:"inputs,omitempty"`
	VCPUs     int    `json:"vcpus"`
	MemoryMiB int    `json:"memory_mib"`
	DiskMiB   int    `json:"disk_mib"`
	// Layers is the number of layers over the file system, and DiskFormat the name of
	// their format (empty: qcow2).
	Layers     int    `json:"layers"`
	DiskFormat string `json:"disk_format,omitempty"`
	// Token is the access token of the guest's daemon (empty: none).
	Token    string   `json:"token,omitempty"`
	Defaults Defaults `json:"defaults,omitzero"`
	// Runs says that a start command of the template runs in it.
	Runs bool `json:"runs,omitempty"`

	// Dir is the capture's folder.
	Dir string `json:"-"`
}

const captureFile = "capture.json"

// Rootfs returns the path of the raw file system below all layers.
func (c *Capture) Rootfs() string { return filepath.Join(c.Dir, rootfsFile) }

// Layer returns the path of layer n over the file system, counted from 0.
func (c *Capture) Layer(n int) string {
	return filepath.Join(c.Dir, fmt.Sprintf("layer-%d.%s", n, cmp.Or(c.DiskFormat, disk.Qcow2.Name())))
}

// Memory returns the path of the memory image's folder.
func (c *Capture) Memory() string { return filepath.Join(c.Dir, "memory") }

// Modules returns the path of the file system with the kernel's modules, which machines
// with the same kernel share. It is empty if the captured machine has none.
func (c *Capture) Modules() string {
	path := filepath.Join(c.Dir, layout.Modules)
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	return path
}

// LinkModules links the file system with the kernel's modules at path into the capture.
// It does nothing if path is empty.
func (c *Capture) LinkModules(path string) error {
	if path == "" {
		return nil
	}
	return os.Link(path, filepath.Join(c.Dir, layout.Modules))
}

// Devices returns the path of the devices' state.
func (c *Capture) Devices() string { return filepath.Join(c.Dir, "devices") }

// OpenCapture reads the record of the capture in dir.
func OpenCapture(dir string) (*Capture, error) {
	path := filepath.Join(dir, captureFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read capture: %w", err)
	}
	c, err := parseCapture(path, b)
	if err != nil {
		return nil, fmt.Errorf("read capture %s: %w", dir, err)
	}
	c.Dir = dir
	return c, nil
}

func parseCapture(path string, b []byte) (*Capture, error) {
	if err := format.Capture.CheckJSON(path, b); err != nil {
		return nil, err
	}
	c := &Capture{}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, err
	}
	if c.ID == uuid.Nil || c.VCPUs < 1 || c.MemoryMiB < 1 || c.DiskMiB < 1 || c.Layers < 1 {
		return nil, errors.New("the record is incomplete")
	}
	return c, nil
}

// Write writes c's record and syncs its folder, which must have all other files. Only the
// owner can read the record, because it has the guest's token.
func (c *Capture) Write() error {
	c.Version = format.Capture.Version
	b, err := json.MarshalIndent(c, "", "\t")
	if err == nil {
		err = os.WriteFile(filepath.Join(c.Dir, captureFile), b, 0o600)
	}
	if err == nil {
		err = syncTree(c.Dir)
	}
	if err != nil {
		return fmt.Errorf("write capture: %w", err)
	}
	return nil
}

// LinkTree makes the folder dst, with links to every file in src.
func LinkTree(src, dst string) error {
	if err := os.Mkdir(dst, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(src)
	if err != nil {
		return err
	}
	for _, e := range entries {
		from, to := filepath.Join(src, e.Name()), filepath.Join(dst, e.Name())
		if e.IsDir() {
			err = LinkTree(from, to)
		} else {
			err = os.Link(from, to)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Captures returns the template's captures. It skips those that it cannot read.
func (t *Template) Captures(dir layout.Dir) ([]*Capture, error) {
	entries, err := os.ReadDir(dir.Captures(t.Team, t.ID))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list captures: %w", err)
	}
	var all []*Capture
	for _, e := range entries {
		if c, err := OpenCapture(filepath.Join(dir.Captures(t.Team, t.ID), e.Name())); err == nil {
			all = append(all, c)
		}
	}
	return all, nil
}

// Publish renames tmp, the folder of a capture, to the template's capture of that name,
// and syncs. If a readable capture of that name exists, it keeps and returns that one.
func (t *Template) Publish(dir layout.Dir, tmp string, name string) (*Capture, error) {
	parent := dir.Captures(t.Team, t.ID)
	if err := os.Mkdir(parent, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("publish capture: %w", err)
	}
	home := filepath.Join(parent, name)
	err := os.Rename(tmp, home)
	if errors.Is(err, fs.ErrExist) {
		c, e := OpenCapture(home)
		if e == nil {
			return c, nil
		}
		if unreadable.Passing(e) {
			return nil, fmt.Errorf("publish capture: %w", e) // the existing one may be readable later
		}
		if _, err = unreadable.Move(dir, unreadable.Capture, home, e); err == nil {
			err = os.Rename(tmp, home)
		}
	}
	if err == nil {
		err = errors.Join(atomicfile.Sync(parent), atomicfile.Sync(filepath.Dir(parent)))
	}
	if err != nil {
		return nil, fmt.Errorf("publish capture: %w", err)
	}
	return OpenCapture(home)
}

// PublishTemplate publishes the folder tmp as the template t, which was captured from a
// sandbox. tmp must have that capture, named [Captured].
func PublishTemplate(dir layout.Dir, tmp string, t Template) error {
	if err := publishTemplate(dir, tmp, t); err != nil {
		return fmt.Errorf("publish template: %w", err)
	}
	return nil
}

// Captured is the name of the only capture of a template that was captured from a
// sandbox.
const Captured = "captured"

func publishTemplate(dir layout.Dir, tmp string, t Template) error {
	captures := filepath.Join(tmp, "captures")
	if err := os.Link(filepath.Join(captures, Captured, rootfsFile), filepath.Join(tmp, rootfsFile)); err != nil {
		return err
	}
	if err := atomicfile.Sync(captures); err != nil {
		return err
	}
	return place(dir, tmp, t)
}

// TempRootfs returns the path of the file system in tmp, the folder of a template that is
// being made.
func TempRootfs(tmp string) string { return filepath.Join(tmp, rootfsFile) }

// PublishRootfs publishes the folder tmp, which has only a file system, as the template t.
func PublishRootfs(dir layout.Dir, tmp string, t Template) error {
	if err := place(dir, tmp, t); err != nil {
		return fmt.Errorf("publish template: %w", err)
	}
	return nil
}

// place writes t's record to the folder tmp, syncs it, and renames it to the template's.
func place(dir layout.Dir, tmp string, t Template) error {
	if err := t.write(tmp); err != nil {
		return err
	}
	if err := syncTree(tmp); err != nil {
		return err
	}
	home := dir.Template(t.Team, t.ID)
	team := filepath.Dir(home)
	if err := os.MkdirAll(team, 0o711); err != nil {
		return err
	}
	if err := os.Rename(tmp, home); err != nil {
		return err
	}
	return errors.Join(atomicfile.Sync(team), atomicfile.Sync(filepath.Dir(team)))
}

// TempTemplate makes a folder for a template that is being made. Unless it is published,
// the next agent finds it among its [Leftovers].
func TempTemplate(dir layout.Dir) (string, error) {
	if err := os.MkdirAll(dir.Images(), 0o711); err != nil {
		return "", err
	}
	return os.MkdirTemp(dir.Images(), tmpPrefix)
}

// Delete removes a template. Links to its files stay valid. It is idempotent. It calls
// between between its steps.
func Delete(dir layout.Dir, team, id uuid.UUID, between func(step string)) error {
	home := dir.Template(team, id)
	gone := filepath.Join(dir.Images(), tmpPrefix+"deleted-"+uuid.NewString())
	err := os.Rename(home, gone)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	between("delete: renamed")
	if err == nil {
		_ = os.Remove(filepath.Dir(home)) // the team's folder, if it is empty
		err = errors.Join(atomicfile.Sync(dir.Images()), os.RemoveAll(gone))
	}
	if err != nil {
		return fmt.Errorf("delete template: %w", err)
	}
	return nil
}

// Leftovers returns the paths of templates that a killed agent was making or removing.
// Nobody may be making templates during the call.
func Leftovers(dir layout.Dir) ([]string, error) {
	entries, err := os.ReadDir(dir.Images())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for unfinished templates: %w", err)
	}
	var all []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tmpPrefix) {
			all = append(all, filepath.Join(dir.Images(), e.Name()))
		}
	}
	return all, nil
}
