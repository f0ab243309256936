package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/wrenn-dev/wrenn/internal/agent/image/oci"
)

// WriteRootfs writes an image's layers, with the guest daemon at envd, as an
// ext4 file system of diskMiB to the folder home, which must be there, and
// returns its path. After an error home is as it was. It needs root's rights.
//
// What the image lacks of a distribution's programs, the daemon does without:
// the first process reaps orphans itself, the clock is not kept (chrony), and
// commands for the shell fail where there is none.
func WriteRootfs(ctx context.Context, img *oci.Image, home, envd string, diskMiB int) (rootfs string, err error) {
	rootfs = filepath.Join(home, rootfsFile)
	tmp, err := os.MkdirTemp(home, tmpPrefix) // for root alone, as the image's files require
	if err != nil {
		return "", fmt.Errorf("write root file system: %w", err)
	}
	defer func() {
		err = errors.Join(err, os.RemoveAll(tmp))
		if err != nil {
			err = fmt.Errorf("write root file system: %w", err)
		}
	}()
	dir, made := filepath.Join(tmp, "tree"), filepath.Join(tmp, rootfsFile)
	// Upper layers may replace what lower ones have.
	if err := img.Unpack(ctx, dir, oci.Limits{Bytes: 2 * int64(diskMiB) << 20}); err != nil {
		return "", err
	}
	if err := injectDaemon(dir, envd); err != nil {
		return "", err
	}
	if err := makeFilesystem(ctx, made, dir, diskMiB); err != nil {
		return "", err
	}
	return rootfs, os.Rename(made, rootfs)
}
