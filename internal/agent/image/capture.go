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

// Capture is a machine as it was when it was captured: a folder that holds all
// that is needed to go on from there. docs/formats.md has its files. They are
// never written to; other folders have links to them.
type Capture struct {
	Version int `json:"version"`
	// ID tells captures apart, wherever they are linked to.
	ID uuid.UUID `json:"id"`
	// Kind is the driver's, see vmm.Driver.
	Kind string `json:"kind"`
	// Inputs is a digest of what it was booted from; empty: it was captured
	// from a sandbox.
	Inputs    string `json:"inputs,omitempty"`
	VCPUs     int    `json:"vcpus"`
	MemoryMiB int    `json:"memory_mib"`
	DiskMiB   int    `json:"disk_mib"`
	// Layers is how many layers there are over the file system, and DiskFormat the
	// name of their format; empty: qcow2.
	Layers     int    `json:"layers"`
	DiskFormat string `json:"disk_format,omitempty"`
	// Token is what the guest's daemon must be shown; empty: nothing.
	Token    string   `json:"token,omitempty"`
	Defaults Defaults `json:"defaults,omitzero"`
	// Runs says that something of the template's own runs in it.
	Runs bool `json:"runs,omitempty"`

	// Dir is the folder.
	Dir string `json:"-"`
}

const captureFile = "capture.json"

// Rootfs is the path of the raw file system below all.
func (c *Capture) Rootfs() string { return filepath.Join(c.Dir, rootfsFile) }

// Layer is the path of the n-th layer over it, from 0.
func (c *Capture) Layer(n int) string {
	return filepath.Join(c.Dir, fmt.Sprintf("layer-%d.%s", n, cmp.Or(c.DiskFormat, disk.Qcow2.Name())))
}

// Memory is the folder of the memory image.
func (c *Capture) Memory() string { return filepath.Join(c.Dir, "memory") }

// Modules is the path of the file system with the kernel's modules, which all machines
// with that kernel share; empty: the captured machine has none.
func (c *Capture) Modules() string {
	path := filepath.Join(c.Dir, layout.Modules)
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	return path
}

// LinkModules gives the captured machine the file system with the kernel's modules at
// path; empty: none.
func (c *Capture) LinkModules(path string) error {
	if path == "" {
		return nil
	}
	return os.Link(path, filepath.Join(c.Dir, layout.Modules))
}

// Devices is the path of the devices' state.
func (c *Capture) Devices() string { return filepath.Join(c.Dir, "devices") }

// OpenCapture reads the record of the capture in a folder.
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
		return nil, errors.New("it lacks something")
	}
	return c, nil
}

// Write writes the record of c, whose other files are there, and syncs the
// folder. It holds the guest's token.
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

// Captures returns the captures of a template. A folder that is none, or whose
// capture this program cannot read, is not among them.
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

// Publish makes the capture whose folder is tmp one of t's: at once, and for
// good when it returns. Of two that are for the same, the first one stays.
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
			return nil, fmt.Errorf("publish capture: %w", e) // the first one is there
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

// PublishTemplate makes the folder tmp, which holds a capture named "captured",
// the template t, captured from a sandbox.
func PublishTemplate(dir layout.Dir, tmp string, t Template) error {
	if err := publishTemplate(dir, tmp, t); err != nil {
		return fmt.Errorf("publish template: %w", err)
	}
	return nil
}

// Captured is the name of the one capture of a template that was captured
// from a sandbox.
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

// TempRootfs is where the file system of a template that is made in the folder
// tmp goes.
func TempRootfs(tmp string) string { return filepath.Join(tmp, rootfsFile) }

// PublishRootfs makes the folder tmp, which holds a file system alone, the
// template t.
func PublishRootfs(dir layout.Dir, tmp string, t Template) error {
	if err := place(dir, tmp, t); err != nil {
		return fmt.Errorf("publish template: %w", err)
	}
	return nil
}

// place makes the folder tmp, which has all but the record, the template t.
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

// TempTemplate makes a folder for a template that is being made. It is one of the
// next agent's [Leftovers] unless it is published.
func TempTemplate(dir layout.Dir) (string, error) {
	if err := os.MkdirAll(dir.Images(), 0o711); err != nil {
		return "", err
	}
	return os.MkdirTemp(dir.Images(), tmpPrefix)
}

// Delete removes a template. Whoever has links to its files keeps them. That
// there is none is no error. between is called between the steps.
func Delete(dir layout.Dir, team, id uuid.UUID, between func(step string)) error {
	home := dir.Template(team, id)
	gone := filepath.Join(dir.Images(), tmpPrefix+"deleted-"+uuid.NewString())
	err := os.Rename(home, gone)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	between("delete: renamed")
	if err == nil {
		_ = os.Remove(filepath.Dir(home)) // the team's folder, if it was the last
		err = errors.Join(atomicfile.Sync(dir.Images()), os.RemoveAll(gone))
	}
	if err != nil {
		return fmt.Errorf("delete template: %w", err)
	}
	return nil
}

// Leftovers returns the paths of what was being made or removed when an agent was
// killed. Nobody else may be making templates meanwhile.
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
