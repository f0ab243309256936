// Package inplace turns off copy-on-write, so that a program can overwrite its files on
// a full disk.
package inplace

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// noCOW is FS_NOCOW_FL of linux/fs.h.
const noCOW = 0x00800000

const zfsMagic = 0x2fc12fc1

// ErrCopies is the error, wrapped, for folders whose new files are copied on write.
var ErrCopies = errors.New("the file system copies files when they are overwritten")

// Set turns off copy-on-write for files that are created in dir from now on, and in new
// folders below it. Only btrfs needs that. Set fails with [ErrCopies] if the file system
// cannot overwrite in place.
func Set(dir string) error { return look(dir, true) }

// Check fails with [ErrCopies] if files that are created in dir are copied on write.
func Check(dir string) error { return look(dir, false) }

// Possible fails with [ErrCopies] if the file system of dir always copies on write.
func Possible(dir string) error {
	_, err := kind(dir)
	return err
}

func look(dir string, set bool) error {
	btrfs, err := kind(dir)
	if err != nil || !btrfs {
		return err
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	switch {
	case err != nil:
		return fmt.Errorf("read flags of %s: %w", dir, err)
	case flags&noCOW != 0:
		return nil
	case !set:
		return fmt.Errorf("%s: %w", dir, ErrCopies)
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags|noCOW)); err != nil {
		return fmt.Errorf("set flags of %s: %w", dir, err)
	}
	return nil
}

// kind reports whether dir is on btrfs, which copies unless a file's flags forbid it.
// It fails with [ErrCopies] if the file system always copies.
func kind(dir string) (btrfs bool, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return false, fmt.Errorf("look at file system of %s: %w", dir, err)
	}
	switch int64(fs.Type) & 0xffffffff {
	case zfsMagic, unix.BCACHEFS_SUPER_MAGIC:
		return false, fmt.Errorf("%s: %w", dir, ErrCopies)
	case unix.BTRFS_SUPER_MAGIC:
		return true, nil
	}
	return false, nil
}
