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

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/agent/image/tree"
	"github.com/wrenn-dev/wrenn/internal/room"
)

// Limits bound an image. Zero fields mean those of DefaultLimits.
type Limits struct {
	Bytes   int64 // of all files of all layers together, and of the layers' archives
	Entries int   // of all layers' archives together
	// Packed is the compressed size of an archive in bytes (0: that of its layers).
	Packed int64
	// Room is the room on the disk for the image (nil: no limit).
	Room *room.Room
	// Reserve, if not nil, is called before bytes of an archive are extracted. If it fails,
	// so does the extraction.
	Reserve func(bytes int64) error
}

// DefaultLimits are enough for images with the tools of several languages.
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

// Unpackable returns the number of bytes to which packed bytes may decompress. Images
// seldom shrink to a tenth; one that shrinks to a thousandth is an attack on the disk.
func Unpackable(packed int64) int64 {
	const ratio, always = 100, 64 << 20
	return always + ratio*min(packed, 1<<50)
}

const (
	maxName  = 4095      // bytes of a name or a link: PATH_MAX without the final NUL
	maxNames = 256 << 20 // bytes of all names, which are kept in memory
	maxDepth = 256       // nested folders
)

// Unpack applies the image's layers (image-spec's layer.md) to the new folder dir, with
// owners, modes, times, links, devices, and the extended attributes security.capability
// and user.*. The caller must be root. After an error there is no dir.
//
// dir has setuid programs and devices that the image chose, so only root may have access
// to its parent.
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
	stream  int64 // bytes of archives that are left
	bytes   int64 // bytes of files that are left
	entries int   // entries that are left
	names   int64 // bytes of names that are left
	// times are the times of folders, by their paths in the tree without links. finish sets
	// them at the end, because new files in a folder change its times.
	times map[string]time.Time
	// made has the paths that the current layer made: true for its entries, false for
	// folders that only contain entries.
	made map[string]bool
	// cleared has the paths of folders without files of lower layers, so that white-outs
	// never look through a folder twice.
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

// meter subtracts what it reads from left, and fails when left is negative.
type meter struct {
	r    io.Reader
	left *int64
}

var errTooLarge = Refuse(nil, "it unpacks to too many bytes")

func (m meter) Read(b []byte) (int, error) {
	n, err := m.r.Read(b)
	if *m.left -= int64(n); *m.left < 0 {
		return 0, errTooLarge
	}
	return n, err
}

// layer applies a layer's archive, whose digest must be want.
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
			if text, ok := clienterr.Text(err); ok {
				return clienterr.Because(err, "entry %.200q: %s", h.Name, text)
			}
			return fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
	}
	if _, err := io.Copy(io.Discard, in); err != nil { // the digest includes what follows the archive
		return fmt.Errorf("read layer: %w", err)
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); got != want {
		return Refuse(nil, "a layer has the digest %s instead of %s", got, want)
	}
	return nil
}

// The names of white-outs (layer.md; the last one is aufs's).
const (
	whiteOut       = ".wh."
	whiteOutOpaque = ".wh..wh..opq"
	whiteOutAufs   = ".wh..wh."
)

// cleanName returns an entry's name without leading and trailing slashes and dots. It is
// "" for the root.
func cleanName(name string) (string, error) {
	if len(name) > maxName || strings.Count(name, "/") > maxDepth {
		return "", Refuse(nil, "its name is too long")
	}
	if strings.ContainsRune(name, 0) {
		return "", Refuse(nil, "its name has a NUL character")
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", Refuse(nil, "its name contains \"..\"")
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
		return Refuse(nil, "its owner %d:%d is out of range", h.Uid, h.Gid)
	}
	if name == "" {
		if h.Typeflag != tar.TypeDir {
			return Refuse(nil, "the root is not a folder")
		}
		return u.root(h)
	}
	parent, base := path.Split(name)
	if strings.HasPrefix(base, whiteOut) {
		return u.whiteOut(parent, base)
	}
	for part := range strings.SplitSeq(parent, "/") {
		if strings.HasPrefix(part, whiteOutAufs) {
			return nil // aufs's own files, such as .wh..wh.plnk
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

// mark notes that the layer made p.
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

// put makes an entry and replaces an existing file of its name.
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
			return Refuse(nil, "its target is too long or has a NUL character")
		}
		if err := dir.Symlink(h.Linkname, base); err != nil {
			return err
		}
	case tar.TypeChar, tar.TypeBlock:
		if h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 {
			// If the tree were on an overlay, this would hide a file.
			return Refuse(nil, "device 0:0 is a white-out of overlayfs")
		}
		if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor >= 1<<12 || h.Devminor >= 1<<20 {
			return Refuse(nil, "device %d:%d is out of range", h.Devmajor, h.Devminor)
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
		return Refuse(nil, "its type %q is unknown", h.Typeflag)
	}
	if err := describe(dir, base, h); err != nil {
		return err
	}
	return dir.Chtimes(base, h.ModTime)
}

// link makes a hard link. It ignores the entry's owner and mode.
func (u *unpacker) link(dir *tree.Dir, base string, h *tar.Header) error {
	target, err := cleanName(h.Linkname)
	if err != nil {
		return err
	}
	parent, old := path.Split(target)
	if old == "" {
		return Refuse(nil, "it is a hard link to the root")
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
		return Refuse(nil, "it is a hard link to a folder")
	}
	if err := dir.Remove(base); err != nil {
		return err
	}
	return dir.Link(from, old, base)
}

// file writes r to a file, with holes for zeros.
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

// hole is the size of the smallest hole in bytes, a block of usual file systems.
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

// describe sets the owner, mode and attributes of a file, in this order, because chown
// clears mode bits and attributes.
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

// wantedAttribute reports whether an extended attribute is part of the image. Others, such
// as labels and those of overlays, belong to the system on which the image was made. The
// kernel supports user.* only for files and folders (xattr(7)).
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

// whiteOut removes what lower layers have: the file that base names, or everything in the
// folder. Files of this layer stay, even those before the white-out.
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
		return Refuse(nil, "it is a white-out without a name")
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
	sub, err := u.tree.Dir(p) // p is a folder, and its path has no links
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

// finish sets the times of folders.
func (u *unpacker) finish() error {
	for p, at := range u.times {
		d, err := u.tree.Dir(p)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue // a later layer removed it
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
