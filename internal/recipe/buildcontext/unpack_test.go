package buildcontext

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// unpack unpacks an archive with the digest want into the folder dir, which must not
// exist. It refuses what Pack does not write; after an error there is no dir.
//
// Nobody gets more rights than the archive's reader: files belong to the calling process,
// without setuid, setgid and sticky bits, and only it can enter dir.
func unpack(ctx context.Context, r io.Reader, want Digest, dir string, limits Limits) (err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("unpack: %w", err), removeAll(dir))
		}
	}()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	u := unpacker{root: root, dirs: map[string]fs.FileMode{".": 0o700}}
	if err := Read(ctx, r, want, limits, u.entry); err != nil {
		return err
	}
	return u.finish()
}

type unpacker struct {
	root *os.Root
	dirs map[string]fs.FileMode // created folders, and their final modes
}

func (u *unpacker) entry(h *tar.Header, t io.Reader) error {
	name := h.Name
	if err := u.parents(path.Dir(name)); err != nil {
		return err
	}
	mode := fs.FileMode(h.Mode) & 0o777
	switch h.Typeflag {
	case tar.TypeDir:
		u.dirs[name] = mode
		return u.root.Mkdir(name, 0o700)
	case tar.TypeSymlink:
		return u.root.Symlink(h.Linkname, name)
	case tar.TypeReg:
		f, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, t)
		if err == nil {
			err = f.Chmod(mode)
		}
		return errors.Join(err, f.Close())
	}
	return fmt.Errorf("entry %q is of type %q: %w", h.Name, h.Typeflag, ErrRefused)
}

// parents creates the folders that have no entry in the archive.
func (u *unpacker) parents(dir string) error {
	if _, ok := u.dirs[dir]; ok {
		return nil
	}
	if err := u.parents(path.Dir(dir)); err != nil {
		return err
	}
	u.dirs[dir] = 0o755
	return u.root.Mkdir(dir, 0o700)
}

// finish sets the folders' modes, the deepest first, because a mode may forbid writing.
func (u *unpacker) finish() error {
	names := make([]string, 0, len(u.dirs))
	for n := range u.dirs {
		names = append(names, n)
	}
	slices.SortFunc(names, func(a, b string) int { return strings.Count(b, "/") - strings.Count(a, "/") })
	for _, n := range names {
		if err := u.root.Chmod(n, u.dirs[n]); err != nil {
			return err
		}
	}
	return nil
}

// removeAll removes what unpack created, even if a folder's mode forbids it.
func removeAll(dir string) error {
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, _ error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(p, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}
