package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/image/oci"
	"github.com/wrenn-dev/wrenn/internal/agent/image/tree"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/room"
)

// maxEnvs bounds the environment that an image sets, in bytes.
const maxEnvs = 1 << 20

// Import makes a template from an image and the guest daemon at envd. t has its id, team,
// name and disk size. The image has the defaults of its processes and, unless inert is
// set, its start command. Import reserves room on disk for what it writes. After an error,
// no part of the template remains. The caller must be root.
func Import(ctx context.Context, dir layout.Dir, img *oci.Image, envd string, t Template, inert bool, disk *room.Room) (Template, error) {
	t, err := importImage(ctx, dir, img, envd, t, inert, disk)
	if err != nil {
		return Template{}, fmt.Errorf("import image: %w", err)
	}
	return t, nil
}

func importImage(ctx context.Context, dir layout.Dir, img *oci.Image, envd string, t Template, inert bool, disk *room.Room) (_ Template, err error) {
	c := img.Config()
	size := 0
	for k, v := range c.Env {
		size += len(k) + len(v) + 2
	}
	if size > maxEnvs {
		return Template{}, oci.Refuse(nil, "its environment has %d bytes, more than %d", size, maxEnvs)
	}
	t.Defaults = Defaults{Envs: c.Env, User: cmp.Or(c.User, "root")}
	if c.WorkingDir != "" {
		t.Defaults.Workdir = path.Join("/", c.WorkingDir)
	}
	if !inert {
		t.Start = slices.Concat(c.Entrypoint, c.Cmd)
	}
	sum, err := img.Digest()
	if err != nil {
		return Template{}, err
	}
	daemon, err := fileDigest(envd)
	if err != nil {
		return Template{}, fmt.Errorf("read guest daemon: %w", err)
	}
	t.Inputs = digest(append([]string{"import", sum, daemon, fmt.Sprint(t.DiskMiB)}, t.Start...)...)
	t.CreatedAt = time.Now().UTC().Truncate(time.Second)
	tmp, err := TempTemplate(dir)
	if err != nil {
		return Template{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	if _, err := WriteRootfs(ctx, img, tmp, envd, t.DiskMiB, disk); err != nil {
		return Template{}, err
	}
	if err := place(dir, tmp, t); err != nil {
		return Template{}, err
	}
	return read(dir, t.Team, t.ID)
}

// makeWorkdir makes an image's working directory if its layers lack it, as container
// runtimes do.
func makeWorkdir(dir, name string) error {
	if name == "" {
		return nil
	}
	t, err := tree.Open(dir)
	if err != nil {
		return err
	}
	defer t.Close()
	d, err := t.MakeDir(name)
	if err != nil {
		return oci.Refuse(err, "its working directory cannot be made")
	}
	return d.Close()
}

// WriteRootfs writes an image's layers and the guest daemon at envd as an ext4 file system
// of diskMiB to the existing folder home, and returns its path. It reserves room on disk
// for what it writes. After an error, home is unchanged. The caller must be root.
//
// The daemon can do without programs that the image lacks: without tini it reaps orphans
// itself, without chrony nothing keeps the clock, and without a shell only shell commands
// fail.
func WriteRootfs(ctx context.Context, img *oci.Image, home, envd string, diskMiB int, disk *room.Room) (rootfs string, err error) {
	rootfs = filepath.Join(home, rootfsFile)
	tmp, err := os.MkdirTemp(home, tmpPrefix) // only root can enter it, as Unpack requires
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
	// Twice the disk, because upper layers may replace files of lower ones.
	if err := img.Unpack(ctx, dir, oci.Limits{Bytes: 2 * int64(diskMiB) << 20, Room: disk}); err != nil {
		return "", err
	}
	if err := injectDaemon(dir, envd); err != nil {
		return "", err
	}
	if err := makeWorkdir(dir, img.Config().WorkingDir); err != nil {
		return "", err
	}
	bytes, err := size(dir)
	if err == nil {
		err = disk.During(bytes, func() error { return makeFilesystem(ctx, made, dir, diskMiB) })
	}
	if err != nil {
		if strings.Contains(err.Error(), "Could not allocate") { // libext2fs's EXT2_ET_*_ALLOC_FAIL
			return "", oci.Refuse(nil, "it does not fit on a disk of %d MiB", diskMiB)
		}
		return "", err
	}
	return rootfs, os.Rename(made, rootfs)
}
