// Package tree changes a root file system in a folder as if the folder were the root: it
// resolves symbolic links, absolute ones too, within the folder and never out of it.
package tree

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Tree is a root file system. It is not safe for concurrent use while one goroutine
// changes it.
type Tree struct {
	fd   int
	path string // resolved by the kernel
}

// Open opens the root file system at dir.
func Open(dir string) (*Tree, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	t := &Tree{fd: fd}
	if t.path, err = os.Readlink(descriptor(fd)); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return t, nil
}

// Close closes the tree. Its files stay.
func (t *Tree) Close() error { return unix.Close(t.fd) }

func descriptor(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// Dir is a folder of a tree. The names that its methods take have one component, or are
// "." for the folder itself. The methods do not follow a link of such a name.
type Dir struct {
	fd int
	// Path is the folder's path in the tree, without links and without a leading slash. It
	// is "" for the root.
	Path string
}

// Dir opens a folder of the tree.
func (t *Tree) Dir(name string) (*Dir, error) {
	name = strings.TrimLeft(path.Clean("/"+name), "/")
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	at := name
	if at == "" {
		at = "."
	}
	var fd int
	err := unix.EAGAIN // openat2(2) may fail with it if any path is renamed during the call
	for range 100 {
		var e error
		fd, e = unix.Openat2(t.fd, at, &how)
		if e == nil {
			err = 0
			break
		}
		if !errors.As(e, &err) || err != unix.EAGAIN {
			break
		}
	}
	if err != 0 {
		return nil, &fs.PathError{Op: "open folder", Path: name, Err: err}
	}
	real, e := os.Readlink(descriptor(fd))
	if e != nil {
		unix.Close(fd)
		return nil, e
	}
	rel, ok := strings.CutPrefix(real, strings.TrimSuffix(t.path, "/"))
	if !ok {
		unix.Close(fd)
		return nil, fmt.Errorf("folder %s is outside of the tree", name)
	}
	return &Dir{fd: fd, Path: strings.TrimPrefix(rel, "/")}, nil
}

// MakeDir opens a folder of the tree. It makes missing folders on the way, with mode 0755.
func (t *Tree) MakeDir(name string) (*Dir, error) {
	d, err := t.Dir(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return d, err
	}
	dir, base := path.Split(path.Clean("/" + name))
	if base == "" {
		return nil, err
	}
	parent, err := t.MakeDir(dir)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	if err := parent.Mkdir(base, 0o755); err != nil {
		return nil, err // for example, a dangling link exists
	}
	return t.Dir(name)
}

// Close closes the folder.
func (d *Dir) Close() error { return unix.Close(d.fd) }

func (d *Dir) fail(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: path.Join(d.Path, name), Err: err}
}

// Lstat describes a file.
func (d *Dir) Lstat(name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, d.fail("lstat", name, err)
}

// Names returns the names in the folder.
func (d *Dir) Names() ([]string, error) {
	fd, err := unix.Openat(d.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, d.fail("open", "", err)
	}
	f := os.NewFile(uintptr(fd), d.Path)
	defer f.Close()
	return f.Readdirnames(-1)
}

// Remove removes a file, or a folder with everything in it. It is idempotent.
func (d *Dir) Remove(name string) error {
	err := unix.Unlinkat(d.fd, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) {
		return d.fail("remove", name, err)
	}
	root, err := os.OpenRoot(descriptor(d.fd))
	if err != nil {
		return err
	}
	defer root.Close()
	return root.RemoveAll(name)
}

// Mkdir makes a folder. The umask does not apply to its mode.
func (d *Dir) Mkdir(name string, mode uint32) error {
	if err := unix.Mkdirat(d.fd, name, mode); err != nil {
		return d.fail("mkdir", name, err)
	}
	return d.Chmod(name, mode)
}

// Create makes an empty file for writing. It fails if the name exists.
func (d *Dir) Create(name string, mode uint32) (*os.File, error) {
	fd, err := unix.Openat(d.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return nil, d.fail("create", name, err)
	}
	return os.NewFile(uintptr(fd), path.Join(d.Path, name)), nil
}

// Symlink makes a symbolic link to text.
func (d *Dir) Symlink(text, name string) error {
	return d.fail("symlink", name, unix.Symlinkat(text, d.fd, name))
}

// Link makes a hard link to the file old in the folder from.
func (d *Dir) Link(from *Dir, old, name string) error {
	return d.fail("link", name, unix.Linkat(from.fd, old, d.fd, name, 0))
}

// Mknod makes a device or a pipe. mode includes the bits of the type.
func (d *Dir) Mknod(name string, mode uint32, dev uint64) error {
	return d.fail("mknod", name, unix.Mknodat(d.fd, name, mode, int(dev)))
}

// Chown changes a file's owner. It does not follow links.
func (d *Dir) Chown(name string, uid, gid uint32) error {
	return d.fail("chown", name, unix.Fchownat(d.fd, name, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW))
}

// Chmod changes a file's mode. It fails for a link.
func (d *Dir) Chmod(name string, mode uint32) error {
	st, err := d.Lstat(name)
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return d.fail("chmod", name, unix.ELOOP)
	}
	return d.fail("chmod", name, unix.Fchmodat(d.fd, name, mode, 0))
}

// Setxattr sets a file's extended attribute. It does not follow links.
func (d *Dir) Setxattr(name, attribute string, value []byte) error {
	// The kernel follows the descriptor's link to the folder, but not name.
	return d.fail("set "+attribute+" of", name, unix.Lsetxattr(descriptor(d.fd)+"/"+name, attribute, value, 0))
}

// Chtimes changes a file's times of access and modification. It does not follow links.
func (d *Dir) Chtimes(name string, at time.Time) error {
	// ext4 can store 1901 to 2446 with 256-byte inodes.
	at = time.Unix(min(max(at.Unix(), -1<<31), 1<<34-1<<31-1), int64(at.Nanosecond()))
	ts, err := unix.TimeToTimespec(at)
	if err != nil {
		return d.fail("set times of", name, err)
	}
	return d.fail("set times of", name, unix.UtimesNanoAt(d.fd, name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
}
