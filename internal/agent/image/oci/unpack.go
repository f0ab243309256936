package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/image/tree"
	"github.com/wrenn-dev/wrenn/internal/agent/told"
	"github.com/wrenn-dev/wrenn/internal/room"
)

// Limits bound an image. Zeros stand for DefaultLimits'.
type Limits struct {
	Bytes   int64 // of all files of all layers together, and of the layers' archives
	Entries int   // of all layers' archives together
	// Packed is how many bytes an archive came in before what it was compressed
	// with was taken off; 0: as many as its layers have.
	Packed int64
	// Room is the room on the disk that the image is written to; nil: no bounds.
	Room *room.Room
	// Reserve, if not nil, is called before bytes of an archive are extracted. Its
	// error ends the extraction.
	Reserve func(bytes int64) error
}

// DefaultLimits are enough for images of several languages' tools.
var DefaultLimits = Limits{Bytes: 16 << 30, Entries: 1_000_000}

func (l Limits) orDefault() Limits {
	if l.Bytes <= 0 {
		l.Bytes = DefaultLimits.Bytes
	}
	if l.Entries <= 0 {
		l.Entries = DefaultLimits.Entries
	}
	return l
}

// Unpackable returns to how many bytes an input of so many may unpack. Images
// seldom shrink to a tenth; what shrinks to a thousandth is there to fill disks.
func Unpackable(packed int64) int64 {
	const ratio, always = 100, 64 << 20
	return always + ratio*min(packed, 1<<50)
}

const (
	maxName  = 4095      // bytes of a name or a link: PATH_MAX, the final NUL aside
	maxNames = 256 << 20 // bytes of all names, which are held in memory
	maxDepth = 256       // folders within each other
)

// Unpack makes the folder dir, which must not be there, of the image's layers,
// one upon the other (image-spec's layer.md): with owners, modes with all
// their bits, times, links, devices, and the extended attributes
// security.capability and user.*. It needs root's rights. After an error
// there is no dir.
//
// dir has setuid programs and devices in it that the image chose: the folder
// it lies in must be closed to everybody else.
func (i *Image) Unpack(ctx context.Context, dir string, limits Limits) (err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("unpack image: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("unpack image: %w", err), os.RemoveAll(dir))
		}
	}()
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	t, err := tree.Open(dir)
	if err != nil {
		return err
	}
	defer t.Close()
	layers, err := i.img.Layers()
	if err != nil {
		return err
	}
	limits = limits.orDefault()
	limits.Bytes = min(limits.Bytes, Unpackable(i.packed))
	u := newUnpacker(t, limits)
	for n, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			return fmt.Errorf("layer %d: %w", n, err)
		}
		err = u.layer(ctx, r, i.file.RootFS.DiffIDs[n].String())
		if err := errors.Join(err, r.Close()); err != nil {
			return fmt.Errorf("layer %d: %w", n, err)
		}
	}
	return u.finish()
}

// unpacker applies layers to a tree.
type unpacker struct {
	tree    *tree.Tree
	limits  Limits
	stream  int64 // bytes of archives that may still come
	bytes   int64 // bytes of files that may still come
	entries int
	names   int64 // bytes of names that may still come
	// times are those of folders, by their paths in the tree without links in
	// them: given at the end, since what is put into a folder changes them.
	times map[string]time.Time
	// made is what the layer at hand has made, by such paths: true for what it
	// has an entry of, false for folders that merely hold such.
	made map[string]bool
	// cleared are folders that have nothing of the layers below any more, by such
	// paths, so that no number of white-outs looks through a folder twice.
	cleared map[string]bool
	buf     []byte
}

func newUnpacker(t *tree.Tree, limits Limits) *unpacker {
	limits = limits.orDefault()
	return &unpacker{
		tree: t, limits: limits, stream: limits.Bytes, bytes: limits.Bytes, entries: limits.Entries, names: maxNames,
		times: map[string]time.Time{}, buf: make([]byte, 64<<10),
	}
}

// meter counts what is read against what may be.
type meter struct {
	r    io.Reader
	left *int64
}

var errTooLarge = Refuse(nil, "it unpacks to more than is allowed")

func (m meter) Read(b []byte) (int, error) {
	n, err := m.r.Read(b)
	if *m.left -= int64(n); *m.left < 0 {
		return 0, errTooLarge
	}
	return n, err
}

// layer applies one layer's archive, whose digest must be want.
func (u *unpacker) layer(ctx context.Context, r io.Reader, want string) error {
	sum := sha256.New()
	in := io.TeeReader(meter{contextReader{ctx, r}, &u.stream}, sum)
	u.made, u.cleared = map[string]bool{}, map[string]bool{}
	t := tar.NewReader(in)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read layer: %w", err)
		}
		if u.entries--; u.entries < 0 || len(u.made) > 2*u.limits.Entries {
			return Refuse(nil, "it has more than %d entries", u.limits.Entries)
		}
		if u.names -= int64(len(h.Name)); u.names < 0 {
			return Refuse(nil, "its entries' names have more than %d bytes", maxNames)
		}
		if err := u.entry(t, h); err != nil {
			if text, ok := told.Text(err); ok {
				return told.Because(err, "entry %.200q: %s", h.Name, text)
			}
			return fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
	}
	if _, err := io.Copy(io.Discard, in); err != nil { // to its end, which the digest is of
		return fmt.Errorf("read layer: %w", err)
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); got != want {
		return Refuse(nil, "it is %s, not %s", got, want)
	}
	return nil
}

// The names of white-outs, in layer.md and, for the last, in aufs, which had
// them first.
const (
	whiteOut       = ".wh."
	whiteOutOpaque = ".wh..wh..opq"
	whiteOutAufs   = ".wh..wh."
)

// cleanName is an entry's name without slashes and dots around it; "" is the
// root itself.
func cleanName(name string) (string, error) {
	if len(name) > maxName || strings.Count(name, "/") > maxDepth {
		return "", Refuse(nil, "its name is too long")
	}
	if strings.ContainsRune(name, 0) {
		return "", Refuse(nil, "its name has a NUL character")
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", Refuse(nil, "its name leads upwards")
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

func (u *unpacker) entry(r io.Reader, h *tar.Header) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) >= 1<<32-1 || int64(h.Gid) >= 1<<32-1 {
		return Refuse(nil, "owner %d:%d", h.Uid, h.Gid)
	}
	if name == "" {
		if h.Typeflag != tar.TypeDir {
			return Refuse(nil, "the root is no folder")
		}
		return u.root(h)
	}
	parent, base := path.Split(name)
	if strings.HasPrefix(base, whiteOut) {
		return u.whiteOut(parent, base)
	}
	for part := range strings.SplitSeq(parent, "/") {
		if strings.HasPrefix(part, whiteOutAufs) {
			return nil // aufs's own, as .wh..wh.plnk: nothing of the image
		}
	}
	dir, err := u.tree.MakeDir(parent)
	if err != nil {
		return err
	}
	defer dir.Close()
	u.mark(path.Join(dir.Path, base))
	return u.put(dir, base, r, h)
}

// mark notes that the layer has made what is at a path.
func (u *unpacker) mark(p string) {
	u.made[p] = true
	for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
		if _, ok := u.made[dir]; ok {
			return
		}
		u.made[dir] = false
	}
}

func (u *unpacker) root(h *tar.Header) error {
	dir, err := u.tree.Dir("")
	if err != nil {
		return err
	}
	defer dir.Close()
	u.times[""] = h.ModTime
	return describe(dir, ".", h)
}

// put makes what an entry says in the place of what has its name.
func (u *unpacker) put(dir *tree.Dir, base string, r io.Reader, h *tar.Header) error {
	mode := uint32(h.Mode) & 0o7777
	if h.Typeflag == tar.TypeDir {
		if st, err := dir.Lstat(base); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if err := dir.Remove(base); err != nil {
				return err
			}
			if err := dir.Mkdir(base, 0o700); err != nil {
				return err
			}
		}
		u.times[path.Join(dir.Path, base)] = h.ModTime
		return describe(dir, base, h)
	}
	if h.Typeflag == tar.TypeLink {
		return u.link(dir, base, h)
	}
	if err := dir.Remove(base); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		if err := u.file(dir, base, r, h.Size); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if len(h.Linkname) > maxName || strings.ContainsRune(h.Linkname, 0) {
			return Refuse(nil, "its text is too long or has a NUL character")
		}
		if err := dir.Symlink(h.Linkname, base); err != nil {
			return err
		}
	case tar.TypeChar, tar.TypeBlock:
		if h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 {
			// Were the tree on an overlay, this would be gone, and what it covers.
			return Refuse(nil, "overlayfs's own white-out is no device")
		}
		if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor >= 1<<12 || h.Devminor >= 1<<20 {
			return Refuse(nil, "there is no device %d:%d", h.Devmajor, h.Devminor)
		}
		kind := uint32(unix.S_IFCHR)
		if h.Typeflag == tar.TypeBlock {
			kind = unix.S_IFBLK
		}
		if err := dir.Mknod(base, kind|mode, unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))); err != nil {
			return err
		}
	case tar.TypeFifo:
		if err := dir.Mknod(base, unix.S_IFIFO|mode, 0); err != nil {
			return err
		}
	default:
		return Refuse(nil, "there is no type %q", h.Typeflag)
	}
	if err := describe(dir, base, h); err != nil {
		return err
	}
	return dir.Chtimes(base, h.ModTime)
}

// link makes a hard link, whose owner and mode are those of what it is.
func (u *unpacker) link(dir *tree.Dir, base string, h *tar.Header) error {
	target, err := cleanName(h.Linkname)
	if err != nil {
		return err
	}
	parent, old := path.Split(target)
	if old == "" {
		return Refuse(nil, "a link to the root")
	}
	from, err := u.tree.Dir(parent)
	if err != nil {
		return err
	}
	defer from.Close()
	if from.Path == dir.Path && old == base {
		return nil
	}
	st, err := from.Lstat(old)
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return Refuse(nil, "a link to a folder")
	}
	if err := dir.Remove(base); err != nil {
		return err
	}
	return dir.Link(from, old, base)
}

// file makes a file of r's bytes, with holes where they are zeros.
func (u *unpacker) file(dir *tree.Dir, base string, r io.Reader, size int64) error {
	if size > u.bytes {
		return errTooLarge
	}
	u.bytes -= size
	f, err := dir.Create(base, 0o600)
	if err != nil {
		return err
	}
	err = u.limits.Room.During(size, func() error { return u.sparse(f, r, size) })
	return errors.Join(err, f.Close())
}

// hole is the least that is left out of a file, a block of the file systems
// that are used.
const hole = 4096

var zeros [hole]byte

func (u *unpacker) sparse(f *os.File, r io.Reader, size int64) error {
	for at := int64(0); at < size; {
		n, err := io.ReadFull(r, u.buf[:min(int64(len(u.buf)), size-at)])
		if err != nil {
			return err
		}
		for b := u.buf[:n]; len(b) > 0; {
			part := b[:min(hole, len(b))]
			if !bytes.Equal(part, zeros[:len(part)]) {
				if _, err := f.WriteAt(part, at); err != nil {
					return err
				}
			}
			at += int64(len(part))
			b = b[len(part):]
		}
	}
	return f.Truncate(size)
}

// describe gives what was made its owner, mode and attributes, in the order in
// which none takes away what another gave.
func describe(dir *tree.Dir, base string, h *tar.Header) error {
	if err := dir.Chown(base, uint32(h.Uid), uint32(h.Gid)); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeSymlink {
		if err := dir.Chmod(base, uint32(h.Mode)&0o7777); err != nil {
			return err
		}
	}
	const prefix = "SCHILY.xattr." // star's, which all tools write
	for key, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(key, prefix)
		if !ok || !wantedAttribute(name, h.Typeflag) {
			continue
		}
		if err := dir.Setxattr(base, name, []byte(value)); err != nil {
			return err
		}
	}
	return nil
}

// wantedAttribute tells of an extended attribute whether it is the image's.
// All others are the system's that the image was made on: its labels and, for
// overlays, where things come from. The kernel takes user.* for files and
// folders alone (xattr(7)).
func wantedAttribute(name string, kind byte) bool {
	file := kind == tar.TypeReg || kind == tar.TypeGNUSparse || kind == tar.TypeCont
	if name == "security.capability" {
		return file
	}
	if !strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "user.overlay.") || strings.HasPrefix(name, "user.fuseoverlayfs.") {
		return false
	}
	return file || kind == tar.TypeDir
}

// whiteOut takes away what layers below have: what base names, or all that
// is in the folder. What this layer has made stays, whichever came first.
func (u *unpacker) whiteOut(parent, base string) error {
	dir, err := u.tree.Dir(parent)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if base == whiteOutOpaque {
		return u.removeLower(dir)
	}
	if strings.HasPrefix(base, whiteOutAufs) {
		return nil
	}
	name := strings.TrimPrefix(base, whiteOut)
	if name == "" || name == "." || name == ".." {
		return Refuse(nil, "a white-out of nothing below the folder")
	}
	return u.removeOne(dir, name)
}

func (u *unpacker) removeOne(dir *tree.Dir, name string) error {
	p := path.Join(dir.Path, name)
	if _, ok := u.made[p]; !ok {
		return dir.Remove(name)
	}
	st, err := dir.Lstat(name)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return err
	}
	sub, err := u.tree.Dir(p) // is a folder, and no folder in its way a link
	if err != nil {
		return err
	}
	defer sub.Close()
	return u.removeLower(sub)
}

func (u *unpacker) removeLower(dir *tree.Dir) error {
	if u.cleared[dir.Path] {
		return nil
	}
	names, err := dir.Names()
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := u.removeOne(dir, n); err != nil {
			return err
		}
	}
	u.cleared[dir.Path] = true
	return nil
}

// finish gives folders their times.
func (u *unpacker) finish() error {
	for p, at := range u.times {
		d, err := u.tree.Dir(p)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue // a later layer took it away
		}
		if err != nil {
			return err
		}
		if d.Path == p {
			err = d.Chtimes(".", at)
		}
		if err := errors.Join(err, d.Close()); err != nil {
			return err
		}
	}
	return nil
}
