package sandbox

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// record is a sandbox's record on disk, with which the next agent can adopt or remove the
// sandbox. It has the sandbox's token.
type record struct {
	Version int `json:"version"`
	// Home names the sandbox's folder and its machine.
	Home      uuid.UUID  `json:"home"`
	Spec      Spec       `json:"spec"`
	State     State      `json:"state"`
	CreatedAt time.Time  `json:"created_at"`
	Slot      *int       `json:"slot,omitempty"` // its network slot
	VM        *vmm.State `json:"vm,omitempty"`   // where it runs, or did
	// Disks is the number of its layers. The guest writes to the last one. Nobody can write
	// to the first Sealed ones any more.
	Disks  int `json:"disks"`
	Sealed int `json:"sealed"`
	// DiskFormat is the name of the layers' format (empty: qcow2).
	DiskFormat string `json:"disk_format,omitempty"`
	// Saved names the state that the last pause saved. A paused sandbox resumes from it. Once
	// the sandbox has run again, the state serves only as a base, so that the next pause
	// writes just the changes.
	Saved *uuid.UUID `json:"saved,omitempty"`
	// Lost says why a paused sandbox has lost its memory, so that it must boot from its disk.
	// Saved is then a state without devices.
	Lost *condition.Condition `json:"lost,omitempty"`
	// PausedAt is the time at which the last pause held the machine.
	PausedAt *time.Time `json:"paused_at,omitempty"`
	Ending   *ending    `json:"ending,omitempty"`
	// Keep is the reason for keeping its files when it ends (empty: remove them). Only an
	// earlier release wrote it, for machines that it could not adopt.
	Keep string `json:"keep,omitempty"`
	// Limits are those of its template.
	Limits rates.Limits `json:"limits,omitempty"`
	// Untold is an event that is not in the journal yet.
	Untold *ending `json:"untold,omitempty"`

	// later and laterSpec are members of the record and of its Spec that only a later release
	// knows. They are preserved.
	later, laterSpec members
}

// members are the members of a JSON object.
type members map[string]json.RawMessage

// unknown returns the members of the object b for which v's type has no field.
func unknown(b []byte, v any) (members, error) {
	var all members
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	for _, f := range reflect.VisibleFields(reflect.TypeOf(v)) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		delete(all, name)
	}
	return all, nil
}

// add returns the object b with the members of m.
func (m members) add(b []byte) ([]byte, error) {
	if len(m) == 0 {
		return b, nil
	}
	all := members{}
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	maps.Copy(all, m)
	return json.Marshal(all)
}

// ending says why a sandbox ends, or why the agent pauses it.
type ending struct {
	// Event is the kind of event for the control plane (empty: none, because it asked for
	// the end).
	Event  journal.Kind `json:"event,omitempty"`
	Reason string       `json:"reason"`
	Time   time.Time    `json:"time"`
}

// save writes the record durably and atomically.
func (r *record) save(dir layout.Dir) error { return r.write(dir, true) }

// jot writes the record without a sync, so that it survives the agent, but perhaps not a
// crash of the host.
func (r *record) jot(dir layout.Dir) error { return r.write(dir, false) }

func (r *record) write(dir layout.Dir, durable bool) error {
	now := *r
	now.Version = format.Sandbox.Version // the record that was read may have an older one
	b, err := now.encode()
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	// The label comes first, so that every record of a sandbox has one. The record's
	// sync makes both durable.
	if err := r.label(dir); err != nil {
		return err
	}
	write := atomicfile.WriteNoSync
	if durable {
		write = atomicfile.Write
	}
	if err := write(dir.SandboxRecord(r.Home), b, 0o600); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// label makes the file that names the folder's sandbox. The folder of a warm machine, which
// is not a sandbox yet, gets none.
func (r *record) label(dir layout.Dir) error {
	if r.State == waiting {
		return nil
	}
	f, err := os.OpenFile(dir.SandboxID(r.Home, r.Spec.ID), os.O_WRONLY|os.O_CREATE, 0o600)
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		return fmt.Errorf("label the sandbox's folder: %w", err)
	}
	return nil
}

// labelled returns the sandbox that a folder's label names, or uuid.Nil if there is no
// single label.
func labelled(dir layout.Dir, home uuid.UUID) (sandbox uuid.UUID) {
	entries, _ := os.ReadDir(dir.Sandbox(home))
	for _, e := range entries {
		text, ok := strings.CutPrefix(e.Name(), layout.SandboxIDPrefix)
		if !ok {
			continue
		}
		id, err := uuid.Parse(text)
		if err != nil || sandbox != uuid.Nil {
			return uuid.Nil
		}
		sandbox = id
	}
	return sandbox
}

func (r *record) encode() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil || len(r.later)+len(r.laterSpec) == 0 {
		return b, err
	}
	spec, err := json.Marshal(r.Spec)
	if err != nil {
		return nil, err
	}
	if spec, err = r.laterSpec.add(spec); err != nil {
		return nil, err
	}
	all := maps.Clone(r.later)
	if all == nil {
		all = members{}
	}
	all["spec"] = spec
	if b, err = all.add(b); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = json.Indent(&out, b, "", "\t")
	return out.Bytes(), err
}

// disk returns the path of layer n.
func (r *record) disk(dir layout.Dir, n int) string {
	return dir.SandboxDisk(r.Home, n, cmp.Or(r.DiskFormat, disk.Qcow2.Name()))
}

// recorded are the states that a record can have. An operation is recorded when it is done.
var recorded = []State{Starting, Running, Paused, Stopping, waiting}

// load reads the record in a folder.
func load(dir layout.Dir, home uuid.UUID) (record, error) {
	b, err := os.ReadFile(dir.SandboxRecord(home))
	if err != nil {
		return record{}, err
	}
	return parseRecord(dir.SandboxRecord(home), b, home)
}

func parseRecord(path string, b []byte, home uuid.UUID) (record, error) {
	if err := format.Sandbox.CheckJSON(path, b); err != nil {
		return record{}, err
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, fmt.Errorf("read record: %w", err)
	}
	var parts struct{ Spec json.RawMessage }
	err := json.Unmarshal(b, &parts)
	if err == nil {
		r.later, err = unknown(b, r)
	}
	if err == nil && parts.Spec != nil {
		r.laterSpec, err = unknown(parts.Spec, r.Spec)
	}
	if err != nil {
		return record{}, fmt.Errorf("read record: %w", err)
	}
	switch {
	case r.Home != home:
		return record{}, fmt.Errorf("read record: it belongs to folder %s", r.Home)
	case !slices.Contains(recorded, r.State):
		return record{}, fmt.Errorf("read record: invalid state %q", r.State)
	case r.Sealed < 0 || r.Sealed > r.Disks || r.Disks > maxDisks+1:
		return record{}, fmt.Errorf("read record: %d of %d disks are sealed", r.Sealed, r.Disks)
	case r.State == Running && (r.VM == nil || r.Slot == nil || r.VM.ID != home || r.Disks < 1):
		return record{}, errors.New("read record: a running sandbox has no machine, slot or disk")
	case r.State == Paused && (r.Saved == nil || r.Disks < 1):
		return record{}, errors.New("read record: a paused sandbox has no saved state or disk")
	}
	return r, nil
}

// empty removes all files in a sandbox's folder except its record and label.
func (r *record) empty(dir layout.Dir) error {
	return removeBut(dir, r.Home, dir.SandboxRecord(r.Home), dir.SandboxID(r.Home, r.Spec.ID))
}

// sweep removes files from a sandbox's folder that its record does not name, such as
// unfinished and outdated ones.
func (r *record) sweep(dir layout.Dir) error {
	keep := []string{dir.SandboxRecord(r.Home), dir.SandboxID(r.Home, r.Spec.ID), dir.SandboxOrigin(r.Home), dir.SandboxModules(r.Home)}
	for n := range r.Disks {
		keep = append(keep, r.disk(dir, n))
	}
	if r.Saved != nil {
		keep = append(keep, dir.SandboxSaved(r.Home, *r.Saved))
	}
	if r.VM != nil {
		keep = append(keep, r.VM.Socket)
	}
	return removeBut(dir, r.Home, keep...)
}

func removeBut(dir layout.Dir, home uuid.UUID, keep ...string) error {
	entries, err := os.ReadDir(dir.Sandbox(home))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("empty folder: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if name := filepath.Join(dir.Sandbox(home), e.Name()); !slices.Contains(keep, name) {
			errs = append(errs, os.RemoveAll(name))
		}
	}
	return errors.Join(errs...)
}
