package kmod

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// index opens an index with the given files.
func index(t testing.TB, text map[string]string) *Index {
	t.Helper()
	dir := t.TempDir()
	for name, s := range text {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	x, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func TestOrder(t *testing.T) {
	x := index(t, map[string]string{
		"modules.dep":     "kernel/a/virtio-mmio.ko: kernel/a/virtio.ko kernel/a/virtio_ring.ko\nkernel/a/virtio.ko: kernel/a/virtio_ring.ko\nkernel/a/virtio_ring.ko:\n",
		"modules.builtin": "kernel/fs/ext4/ext4.ko\n",
	})
	got, err := x.Order("virtio_mmio", "ext4")
	want := []string{"kernel/a/virtio_ring.ko", "kernel/a/virtio.ko", "kernel/a/virtio-mmio.ko"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	if _, err := x.Order("nothing"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a missing module: %v", err)
	}
	if _, err := index(t, map[string]string{"modules.dep": "a.ko: b.ko\nb.ko: a.ko\n"}).Order("a"); err == nil {
		t.Error("a cycle was not noticed")
	}
}

func TestFind(t *testing.T) {
	x := index(t, map[string]string{
		"modules.dep":             "kernel/net/xt_LOG.ko:\nkernel/drivers/tun.ko:\nkernel/a.ko:\nkernel/b.ko:\n",
		"modules.builtin":         "kernel/fs/ext4/ext4.ko\n",
		"modules.softdep":         "# comment\nsoftdep xt_LOG pre: nf-log-syslog other post: last\nsoftdep cifs gcm\n",
		"modules.alias":           "alias char-major-10-200 tun\nalias devname:net/tun tun\nalias pci:v*d00[12]sv* a\nalias pci:v0000*bc/x* b\nalias ipt_LOG xt_LOG\n",
		"modules.symbols":         "alias symbol:tun_get_socket tun\n",
		"modules.builtin.modinfo": "ext4.license=GPL\x00ext4.alias=fs-ext4\x00",
	})
	for name, want := range map[string][]string{
		"tun": {"tun"}, "xt-LOG": {"xt_LOG"}, "ipt_LOG": {"xt_LOG"}, "char-major-10-200": {"tun"}, "devname:net/tun": {"tun"},
		"symbol:tun_get_socket": {"tun"}, "fs-ext4": {"ext4"}, "ext4": {"ext4"}, "pci:v1/2d001sv3": {"a"}, "pci:v0000d002svbc/x": {"a", "b"},
		"nothing": nil, "pci:v1d003sv": nil, "": nil,
	} {
		if got := x.Find(name); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
	if before, after := x.Soft("xt_LOG"); !slices.Equal(before, []string{"nf-log-syslog", "other"}) || !slices.Equal(after, []string{"last"}) {
		t.Errorf("around xt_LOG: %q, %q", before, after)
	}
	if before, after := x.Soft("cifs"); before != nil || after != nil {
		t.Errorf("around cifs: %q, %q", before, after)
	}
	if _, err := Open(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an index without modules: %v", err)
	}
}

func FuzzOrder(f *testing.F) {
	f.Add([]byte("a.ko: b.ko\nb.ko:\n"), "a")
	f.Fuzz(func(t *testing.T, dep []byte, name string) {
		order, err := parse([len(files)][]byte{dep}).Order(name)
		if err == nil && len(order) > 0 && Name(order[len(order)-1]) != underscores(name) {
			t.Errorf("%q is not the last of %q", name, order)
		}
	})
}

func FuzzFind(f *testing.F) {
	f.Add([]byte("alias a* b\n"), []byte("softdep b pre: c\n"), "abc")
	f.Fuzz(func(_ *testing.T, alias, soft []byte, name string) {
		x := parse([len(files)][]byte{2: soft, 3: alias})
		for _, m := range x.Find(name) {
			x.Soft(m)
		}
	})
}
