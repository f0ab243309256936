package qemu

import (
	"context"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
)

// TestModules checks that a guest can load the distribution kernel's modules, by name and
// on demand, before it is saved and after it is restored, and that it cannot change what
// other guests see.
func TestModules(t *testing.T) {
	b := subject.NewBench(t)
	b.Boot("first")
	try := func(script string) {
		t.Helper()
		if out := b.Sh("( " + script + " ) 2>&1 || echo failed"); strings.HasSuffix(out, "failed") {
			t.Errorf("%s: %s", script, out)
		}
	}
	// The kernel requests these modules itself.
	try("ip link add v0 type veth peer name v1 && ip link add br0 type bridge && ip link set v0 master br0")
	try("ip link add wg0 type wireguard && ip link add link v0 name v0.5 type vlan id 5")
	try("mount -t binfmt_misc binfmt /proc/sys/fs/binfmt_misc")
	try("truncate -s 16M /tmp/disk && mke2fs -q -t ext2 /tmp/disk && mkdir /tmp/m && mount -o loop /tmp/disk /tmp/m && umount /tmp/m")
	try("head -c 0 /dev/fuse; grep -q fuse /proc/filesystems")
	try("modprobe nbd && test -b /dev/nbd0")
	// Packages can add modules and headers.
	try("cd /lib/modules/$(uname -r) && touch added && depmod && test -s modules.dep")
	b.Sh("sync")
	image, devices := b.Save(nil)
	b.Kill()
	ram, err := image.Materialize(t.Context(), "saved")
	b.Must(err)
	defer ram.Close()

	b.Spec.ID = uuid.New()
	b.Resume(vmm.Saved{Memory: ram, Devices: devices}, "first", "second")
	try("ip tuntap add dev tap0 mode tap && ip link show br0")
	try("modprobe nf_tables && grep -q '^nf_tables ' /proc/modules")
	try("cd /lib/modules/$(uname -r) && test -e added && modinfo wireguard")
	// All guests share the disk of modules, so none may change it.
	try("! touch /lib/modules/.wrenn/image/x")
	try("! dd if=/dev/zero of=/dev/vdb bs=4096 count=1 oflag=direct")
}

// earlier is a driver whose machines boot like those of an earlier release.
type earlier struct {
	*Driver
	as model
}

func (d earlier) Start(ctx context.Context, s vmm.Spec) (vmm.VM, error) {
	ram, err := emptyMemory(int64(s.MemoryMiB) << 20)
	if err != nil {
		return nil, err
	}
	defer ram.Close()
	vm, err := d.launch(ctx, s, d.as, d.processor, ram, nil, func(ctx context.Context, m *machine) error {
		return m.qmp.Execute(ctx, "cont", nil, nil)
	})
	if err != nil {
		return nil, err
	}
	return vm, nil
}

// TestEarlierModels checks that a machine saved by an earlier release can be restored,
// without the disk of modules, which that release did not have.
func TestEarlierModels(t *testing.T) {
	b := subject.NewBench(t)
	d := b.Driver.(*Driver)
	for _, m := range models[d.accel][1:] {
		t.Run(m.name(), func(t *testing.T) {
			b := subject.NewBench(t)
			b.Driver = earlier{b.Driver.(*Driver), m}
			b.Boot("first")
			b.Sh("test ! -e /dev/vdb; echo kept >/dev/shm/kept; sync")
			image, devices := b.Save(nil)
			kind := b.VM.State().Kind
			b.Kill()
			ram, err := image.Materialize(t.Context(), "saved")
			b.Must(err)
			defer ram.Close()
			b.Must(b.Driver.Restores(kind))
			b.Spec.ID = uuid.New()
			b.Resume(vmm.Saved{Memory: ram, Devices: devices, Kind: kind}, "first", "second")
			if got := b.Sh("cat /dev/shm/kept; test ! -e /dev/vdb"); got != "kept" {
				t.Errorf("the guest has %q", got)
			}
			if got := b.VM.State().Kind; got != kind {
				t.Errorf("the machine was restored as %q, and saved as %q", got, kind)
			}
		})
	}
}
