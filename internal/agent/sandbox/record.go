package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// recordVersion changes when older agents cannot read the record any more.
const recordVersion = 1

// record is what is on disk of a sandbox: enough for the next agent to take
// it back, or to remove it. It holds the sandbox's token.
type record struct {
	Version   int        `json:"version"`
	Spec      Spec       `json:"spec"`
	State     State      `json:"state"`
	CreatedAt time.Time  `json:"created_at"`
	Slot      *int       `json:"slot,omitempty"` // its network slot
	VM        *vmm.State `json:"vm,omitempty"`   // where it runs
	Ending    *ending    `json:"ending,omitempty"`
}

// ending is why a sandbox ends.
type ending struct {
	// Event is what the control plane is told; empty: it knows.
	Event  journal.Kind `json:"event,omitempty"`
	Reason string       `json:"reason"`
	Time   time.Time    `json:"time"`
}

// save writes the record durably, all of it or nothing.
func (r *record) save(dir layout.Dir) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	path := dir.SandboxRecord(r.Spec.ID)
	f, err := os.CreateTemp(filepath.Dir(path), "record-") // mode 0600
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write record: %w", err), os.Remove(f.Name()))
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// load reads the record of a sandbox.
func load(dir layout.Dir, id uuid.UUID) (record, error) {
	b, err := os.ReadFile(dir.SandboxRecord(id))
	if err != nil {
		return record{}, err
	}
	return parseRecord(b, id)
}

func parseRecord(b []byte, id uuid.UUID) (record, error) {
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, fmt.Errorf("read record: %w", err)
	}
	switch {
	case r.Version != recordVersion:
		return record{}, fmt.Errorf("read record: version %d is not %d", r.Version, recordVersion)
	case r.Spec.ID != id:
		return record{}, fmt.Errorf("read record: it is of sandbox %s", r.Spec.ID)
	case r.State == Running && (r.VM == nil || r.Slot == nil || r.VM.ID != id):
		return record{}, errors.New("read record: it runs nowhere")
	}
	return r, nil
}

// empty removes all files of a sandbox's folder but its record.
func empty(dir layout.Dir, id uuid.UUID) error {
	entries, err := os.ReadDir(dir.Sandbox(id))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("empty folder: %w", err)
	}
	keep := filepath.Base(dir.SandboxRecord(id))
	var errs []error
	for _, e := range entries {
		if e.Name() != keep {
			errs = append(errs, os.RemoveAll(filepath.Join(dir.Sandbox(id), e.Name())))
		}
	}
	return errors.Join(errs...)
}
