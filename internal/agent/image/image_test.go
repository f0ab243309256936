package image

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"
)

func TestLoadOrder(t *testing.T) {
	dep := []byte("kernel/a/virtio-mmio.ko: kernel/a/virtio.ko kernel/a/virtio_ring.ko\nkernel/a/virtio.ko: kernel/a/virtio_ring.ko\nkernel/a/virtio_ring.ko:\n")
	got, err := loadOrder(dep, []byte("kernel/fs/ext4/ext4.ko\n"), []string{"virtio_mmio", "ext4"})
	want := []string{"kernel/a/virtio_ring.ko", "kernel/a/virtio.ko", "kernel/a/virtio-mmio.ko"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	if _, err := loadOrder(dep, nil, []string{"nothing"}); err == nil {
		t.Error("a module that is not there was found")
	}
	if _, err := loadOrder([]byte("a.ko: b.ko\nb.ko: a.ko\n"), nil, []string{"a"}); err == nil {
		t.Error("a circle was not noticed")
	}
}

func FuzzLoadOrder(f *testing.F) {
	f.Add([]byte("a.ko: b.ko\nb.ko:\n"), "a")
	f.Fuzz(func(t *testing.T, dep []byte, name string) {
		order, err := loadOrder(dep, nil, []string{name})
		if err == nil && len(order) > 0 && moduleName(order[len(order)-1]) != name {
			t.Errorf("%q is not the last of %q", name, order)
		}
	})
}

func bzImage(size int, offset, length uint32) []byte {
	b := make([]byte, size)
	b[0x1f1] = 1
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x20f)
	binary.LittleEndian.PutUint32(b[0x248:], offset)
	binary.LittleEndian.PutUint32(b[0x24c:], length)
	return b
}

func TestPayload(t *testing.T) {
	b := bzImage(2048, 16, 100)
	got, err := payload(b)
	if err != nil || len(got) != 100 || &got[0] != &b[1024+16] {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	for _, bad := range [][]byte{nil, make([]byte, 4096), bzImage(2048, 2000, 100), bzImage(2048, 1<<32-1, 1<<32-1), bzImage(2048, 0, 0)} {
		if _, err := payload(bad); !errors.Is(err, errNoKernel) {
			t.Errorf("got %v, want errNoKernel", err)
		}
	}
}

func FuzzPayload(f *testing.F) {
	f.Add(bzImage(2048, 16, 100))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = payload(b) })
}
