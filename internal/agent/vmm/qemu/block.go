package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/wrenn-dev/wrenn/internal/agent/launcher"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
)

// object is one of QEMU's JSON objects.
type object = map[string]any

// overlayNode is the prefix of nodes of QEMU's block graph: overlay-0 is the overlay with
// which QEMU started, overlay-1 the one above it, and so on.
const overlayNode = "overlay-"

// fdset returns the name under which QEMU opens a descriptor of a set.
func fdset(set int) string { return "/dev/fdset/" + strconv.Itoa(set) }

// file returns the node of a file that QEMU opens from a set. QEMU must not lock it, because
// several QEMUs share a descriptor. The agent decides who may open a file.
func file(set int) object {
	return object{"driver": "file", "filename": fdset(set), "locking": "off"}
}

// readOnly makes an image's node read-only.
func readOnly(image object) object {
	image["read-only"] = true
	return image
}

// overlay returns a writable qcow2 node. When another overlay is put above it, QEMU reopens
// its file for reading only.
func overlay(node string, set int, backing any) object {
	return object{"driver": "qcow2", "node-name": node, "discard": "unmap", "file": file(set), "backing": backing}
}

// writableFD is the purpose of the descriptor for writing to a node. The driver removes it
// from QEMU when another overlay is above the node.
func writableFD(node string) string { return "write " + node }

func isWritableFD(opaque string) bool { return strings.HasPrefix(opaque, writableFD("")) }

// fdsets are the sets of descriptors with which a QEMU starts.
type fdsets struct {
	h    *handed
	n    int
	args []string // QEMU's arguments
}

// add makes a set of descriptors of one file, one for each of the flags of open(2).
func (f *fdsets) add(name string, flags ...int) (set int, err error) {
	f.n++
	for _, flag := range flags {
		n, err := f.h.open(name, flag)
		if err != nil {
			return 0, err
		}
		arg := fmt.Sprintf("fd=%d,set=%d", n, f.n)
		if flag == os.O_RDWR {
			arg += ",opaque=" + writableFD(overlayNode+"0")
		}
		f.args = append(f.args, "-add-fd", arg)
	}
	return f.n, nil
}

// chain passes the files of a machine's disk to QEMU and returns the node of its overlay.
func chain(s vmm.Spec, f *fdsets) (object, error) {
	set, err := f.add(s.Base, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	below := rawImage(set)
	for _, layer := range s.Layers {
		if set, err = f.add(layer, os.O_RDONLY); err != nil {
			return nil, err
		}
		below = readOnly(object{"driver": "qcow2", "file": readOnly(file(set)), "backing": below})
	}
	// The read-only descriptor is for the time after Divert.
	if set, err = f.add(s.Overlay, os.O_RDWR, os.O_RDONLY); err != nil {
		return nil, err
	}
	return overlay(overlayNode+"0", set, below), nil
}

// rawImage returns the node of a read-only raw image.
func rawImage(set int) object { return readOnly(object{"driver": "raw", "file": readOnly(file(set))}) }

// modulesNode is the node of the disk with the kernel's modules.
const modulesNode = "modules"

// modulesQueue is the length of that disk's queue. The guest allocates memory for each
// request.
const modulesQueue = 32

// diskArguments returns QEMU's arguments for the disks of a machine of the model. The
// guest's own disk comes first, so that it is /dev/vda.
func diskArguments(s vmm.Spec, as model, h *handed) ([]string, error) {
	f := &fdsets{h: h}
	var args []string
	add := func(node object, device string) error {
		b, err := json.Marshal(node)
		args = append(args, "-blockdev", string(b), "-device", "virtio-blk-device,drive="+device)
		return err
	}
	if s.Overlay != "" {
		node, err := chain(s, f)
		if err != nil {
			return nil, err
		}
		if err := add(node, overlayNode+"0"); err != nil {
			return nil, err
		}
	}
	if s.Modules != "" && as.modules {
		set, err := f.add(s.Modules, os.O_RDONLY)
		if err != nil {
			return nil, err
		}
		node := rawImage(set)
		node["node-name"] = modulesNode
		if err := add(node, fmt.Sprintf("%s,queue-size=%d", modulesNode, modulesQueue)); err != nil {
			return nil, err
		}
	}
	return append(f.args, args...), nil
}

// opBytes is the size in bytes up to which a request counts as one operation.
const opBytes = 256 << 10

// node is a node of QEMU's block graph.
type node struct {
	Name   string `json:"node-name"`
	Active *bool  `json:"active"` // nil: yes, in a QEMU without this field
	Image  struct {
		Bytes int64 `json:"virtual-size"`
	} `json:"image"`
}

var errNoDisk = errors.New("the machine has no disk")

// guestDisk is a disk of the guest and the node to which it writes.
type guestDisk struct {
	Device   string `json:"qdev"`
	Inserted node   `json:"inserted"`
}

// disks returns the guest's disks.
func (m *machine) disks(ctx context.Context) (all []guestDisk, err error) {
	err = m.qmp.Execute(ctx, "query-block", nil, &all)
	return all, err
}

// disk returns the guest's own disk.
func (m *machine) disk(ctx context.Context) (guestDisk, error) {
	disks, err := m.disks(ctx)
	if err != nil {
		return guestDisk{}, err
	}
	disks = slices.DeleteFunc(disks, func(d guestDisk) bool { return d.Inserted.Name == modulesNode })
	if len(disks) == 0 {
		return guestDisk{}, errNoDisk
	}
	if len(disks) > 1 || !strings.HasPrefix(disks[0].Inserted.Name, overlayNode) {
		return guestDisk{}, errors.New("query-block: QEMU has other disks than the agent gave it")
	}
	return disks[0], nil
}

// top returns the node to which the guest's disk writes.
func (m *machine) top(ctx context.Context) (node, error) {
	d, err := m.disk(ctx)
	return d.Inserted, err
}

// limitGroup is QEMU's throttle group, with which all disks of a guest share the rates.
const limitGroup = "guest"

// limit makes QEMU delay the guest's reads and writes above the rates. The limits belong to
// the devices, so they survive Divert.
func (m *machine) limit(ctx context.Context, r rates.Rates) error {
	if r.DiskBytes == 0 && r.DiskOps == 0 {
		return nil
	}
	disks, err := m.disks(ctx)
	if err != nil {
		return fmt.Errorf("limit disk: %w", err)
	}
	args := object{"group": limitGroup, "bps": r.DiskBytes, "bps_rd": 0, "bps_wr": 0, "iops": r.DiskOps, "iops_rd": 0, "iops_wr": 0}
	// bps_max and iops_max are the bursts. QEMU accepts none below the rate; without one, the
	// burst is a tenth of the rate.
	if n := r.AtOnce(r.DiskBytes); r.DiskBytes > 0 && n >= r.DiskBytes {
		args["bps_max"] = n
	}
	if n := r.AtOnce(r.DiskOps); r.DiskOps > 0 && n >= r.DiskOps {
		args["iops_max"] = n
	}
	if r.DiskOps > 0 {
		args["iops_size"] = opBytes
	}
	for _, d := range disks {
		args["id"] = d.Device
		if err := m.qmp.Execute(ctx, "block_set_io_throttle", args, nil); err != nil {
			return fmt.Errorf("limit disk: %w", err)
		}
	}
	return nil
}

// Divert implements vmm.VM.
//
// A QEMU that its guest has taken over may keep its writable descriptor of the earlier
// overlay. So the caller must copy that overlay before it shares it, or end the machine.
func (m *machine) Divert(ctx context.Context, path string) (err error) {
	ctx, cancel := unbroken(ctx)
	defer cancel()
	defer func() {
		if err != nil {
			err = fmt.Errorf("divert: %w", err)
		}
	}()
	now, err := m.top(ctx)
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(now.Name, overlayNode), 10, 32)
	if err != nil {
		return fmt.Errorf("the disk's node is %q", now.Name)
	}
	name := overlayNode + strconv.FormatUint(n+1, 10)

	m.mayDrop()
	set, err := m.passOverlay(ctx, path, name)
	if err != nil {
		return err
	}
	if err := m.qmp.Execute(ctx, "blockdev-add", overlay(name, set, nil), nil); err != nil {
		return errors.Join(err, m.removeSet(ctx, set))
	}
	// It flushes the earlier overlay, or fails.
	if err := m.qmp.Execute(ctx, "blockdev-snapshot", object{"node": now.Name, "overlay": name}, nil); err != nil {
		return errors.Join(err, m.qmp.Execute(ctx, "blockdev-del", object{"node-name": name}, nil), m.removeSet(ctx, set))
	}
	return nil
}

// passOverlay passes an overlay's file to QEMU: for writing, and for reading when another
// overlay is above it.
func (m *machine) passOverlay(ctx context.Context, path, name string) (set int, err error) {
	set = -1
	defer func() {
		if err != nil && set >= 0 {
			err = errors.Join(err, m.removeSet(ctx, set))
		}
	}()
	for flag, opaque := range map[int]string{os.O_RDWR: writableFD(name), os.O_RDONLY: "read"} {
		f, err := os.OpenFile(path, flag, 0)
		if err != nil {
			return set, err
		}
		added, err := m.qmp.Pass(ctx, f, set, opaque)
		f.Close()
		if err != nil {
			return set, err
		}
		set = added.Set
	}
	return set, nil
}

// removeSet makes QEMU close a set of descriptors.
func (m *machine) removeSet(ctx context.Context, set int) error {
	return m.qmp.Execute(ctx, "remove-fd", object{"fdset-id": set}, nil)
}

// Grow implements vmm.VM.
func (m *machine) Grow(ctx context.Context, bytes int64) error {
	ctx, cancel := unbroken(ctx)
	defer cancel()
	now, err := m.top(ctx)
	if err != nil {
		return fmt.Errorf("grow disk: %w", err)
	}
	if bytes < now.Image.Bytes {
		return fmt.Errorf("grow disk: it has %d bytes already, more than %d", now.Image.Bytes, bytes)
	}
	// Since QEMU 10, the disk of a restored machine is inactive until it first runs.
	if now.Active != nil && !*now.Active {
		if err := m.qmp.Execute(ctx, "blockdev-set-active", object{"active": true}, nil); err != nil {
			return fmt.Errorf("grow disk: %w", err)
		}
	}
	if err := launcher.SetFileBytes(m.state.PID, fileBytes(bytes)); err != nil {
		return fmt.Errorf("grow disk: %w", err)
	}
	if err := m.qmp.Execute(ctx, "block_resize", object{"node-name": now.Name, "size": bytes}, nil); err != nil {
		return fmt.Errorf("grow disk: %w", err)
	}
	return nil
}
