package image

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/wrenn-dev/wrenn/internal/programs"
)

// wanted are the modules that a guest needs to boot, unless they are built in: those for
// the bus, its devices, snapshots and clocks.
var wanted = []string{
	"virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon",
	"overlay", "vmw_vsock_virtio_transport", "ptp_kvm", "ext4",
}

// modulesVersion must change when the same package gives other modules.
const modulesVersion = "1"

// modulesDate is the date of all files in an image of modules, in seconds: 2 January 1980,
// like that of files that recipes copy.
const modulesDate = "315619200"

// modulesUUID is the UUID of the file system, and the seed of its folders' hashes.
const modulesUUID = "77726e6e-6d6f-6475-6c65-730000000001"

// indexModules decompresses the modules of an unpacked package, so that any guest's
// modprobe can read them, and indexes them.
func indexModules(ctx context.Context, tree, release string) error {
	err := filepath.WalkDir(moduleTree(tree, release), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		plain := strings.TrimSuffix(path, filepath.Ext(path))
		if filepath.Ext(plain) != ".ko" {
			return nil
		}
		data, err := readModule(path)
		if err != nil {
			return err
		}
		if err := os.WriteFile(plain, data, 0o644); err != nil {
			return err
		}
		return os.Remove(path)
	})
	if err != nil {
		return fmt.Errorf("unpack modules: %w", err)
	}
	_, err = output(ctx, "", programs.Depmod, "-b", tree, release)
	return err
}

// moduleTree returns the folder of the kernel's modules in an unpacked package.
func moduleTree(tree, release string) string { return filepath.Join(tree, "lib", "modules", release) }

// writeModules writes the modules in dir as a read-only file system. It is reproducible.
func writeModules(ctx context.Context, name, dir string) error {
	const block, inode, spare = 4096, 256, 16
	var bytes, inodes int64
	var dates strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		inside, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		bytes += (info.Size() + block - 1) / block * block
		inodes++
		for _, field := range []string{"atime", "ctime", "crtime", "mtime"} {
			fmt.Fprintf(&dates, "set_inode_field \"/%s\" %s @%s\n", inside, field, modulesDate)
		}
		return nil
	})
	if err != nil {
		return err
	}
	inodes += spare
	mib := (bytes+inodes*inode)*101/100>>20 + 4
	// e2fsprogs use this time instead of the clock's.
	clock := []string{"E2FSPROGS_FAKE_TIME=" + modulesDate}
	if _, err := outputWith(ctx, clock, "", programs.Mke2fs, "-q", "-t", "ext4", "-L", "wrenn-modules", "-m", "0", "-b", fmt.Sprint(block), "-I", fmt.Sprint(inode),
		"-N", fmt.Sprint(inodes), "-U", modulesUUID, "-O", "^has_journal,^resize_inode",
		"-E", "hash_seed="+modulesUUID+",lazy_itable_init=0,nodiscard,root_owner=0:0", "-d", dir, name, fmt.Sprintf("%dM", mib)); err != nil {
		return err
	}
	script := name + ".dates"
	if err := os.WriteFile(script, []byte(dates.String()), 0o600); err != nil {
		return err
	}
	defer os.Remove(script)
	if _, err := outputWith(ctx, clock, "", programs.Debugfs, "-w", "-f", script, name); err != nil {
		return err
	}
	return os.Chmod(name, 0o444)
}
