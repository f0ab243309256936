package client

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
	"strings"
)

// Bounds of what [Client.Receive] writes unless its options say otherwise.
const (
	MaxReceivedBytes     = 32 << 30
	MaxReceivedEntries   = 1_000_000
	MaxReceivedNameBytes = 256 << 20
)

// maxPath is Linux's limit for a path and for the target of a symbolic link, in bytes.
const maxPath = 4095

// ReceiveOptions says how [Client.Receive] copies. Zero fields have the defaults
// in parentheses.
type ReceiveOptions struct {
	// User is the user whose rights apply in the sandbox (user).
	User string
	// Merge allows a target folder that exists, and replaces its files that have the same
	// names. Without it, Receive refuses such a target.
	Merge bool
	// Links keeps symbolic links that lead outside of what is copied.
	Links bool
	// MaxBytes and MaxEntries bound what is written ([MaxReceivedBytes] and
	// [MaxReceivedEntries]), MaxNameBytes the length of all names and links, some
	// of which Receive keeps in memory ([MaxReceivedNameBytes]).
	MaxBytes     int64
	MaxEntries   int
	MaxNameBytes int64
	// Skipped is called for each entry that Receive leaves out, with the reason. The guest
	// chooses the name, which may have control characters.
	Skipped func(name, why string)
}

// Receive copies a file or folder of a sandbox to the local path target, whose folder
// must exist. The guest is not trusted: whatever it sends, Receive writes only target
// and follows no symbolic link. It leaves out devices, special modes, write permission
// for others, and links that lead outside. The copy appears under its name when it is
// complete. If Receive fails, target is unchanged, but a merge may be half done.
func (c *Client) Receive(ctx context.Context, id, source, target string, o ReceiveOptions) error {
	r, err := c.ReadArchive(ctx, id, source, o.User)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := receiveArchive(r, target, o); err != nil {
		return fmt.Errorf("copy %s: %w", source, err)
	}
	return nil
}

// receiveArchive writes a tar archive, which has one top entry, to target.
func receiveArchive(r io.Reader, target string, o ReceiveOptions) (err error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = MaxReceivedBytes
	}
	if o.MaxEntries == 0 {
		o.MaxEntries = MaxReceivedEntries
	}
	if o.MaxNameBytes == 0 {
		o.MaxNameBytes = MaxReceivedNameBytes
	}
	if o.Skipped == nil {
		o.Skipped = func(string, string) {}
	}
	dir, name := filepath.Split(filepath.Clean(target))
	if name == "" || name == "." || name == ".." {
		return fmt.Errorf("%s cannot be the name of a copy", target)
	}
	if dir == "" {
		dir = "."
	}
	// Beside the target, so that the rename stays on one file system.
	staging, err := os.MkdirTemp(dir, ".wrenn-copy-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeAll(staging)) }()
	u := &unpacker{dir: filepath.Join(staging, "copy"), o: o}
	if err := u.unpack(tar.NewReader(r)); err != nil {
		return err
	}
	return place(u.dir, target, o.Merge)
}

// unpacker unpacks an archive into a folder that no other process writes to. Links
// come last, so that no entry can be written through one.
type unpacker struct {
	dir     string // becomes the copy
	o       ReceiveOptions
	top     string // the archive's only top entry
	folder  bool   // the top entry is a folder
	entries int
	bytes   int64
	names   int64 // bytes of names and links
	links   []link
	modes   []mode
}

type link struct{ name, path, to string }

// mode is a folder's mode, which is set when the folder is complete.
type mode struct {
	path string
	mode fs.FileMode
}

func (u *unpacker) unpack(t *tar.Reader) error {
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		if u.entries++; u.entries > u.o.MaxEntries {
			return fmt.Errorf("it has more than %d entries", u.o.MaxEntries)
		}
		if u.names += int64(len(h.Name) + len(h.Linkname)); u.names > u.o.MaxNameBytes {
			return fmt.Errorf("its names and links have more than %d bytes", u.o.MaxNameBytes)
		}
		if len(h.Name) > maxPath {
			return fmt.Errorf("a name has more than %d bytes", maxPath)
		}
		if err := u.entry(t, h); err != nil {
			return fmt.Errorf("write %q: %w", h.Name, err)
		}
	}
	if u.top == "" {
		return errors.New("the sandbox sent nothing")
	}
	for _, l := range u.links {
		if err := os.Symlink(l.to, l.path); errors.Is(err, fs.ErrExist) {
			u.o.Skipped(l.name, "the archive has it twice")
		} else if err != nil {
			return err
		}
	}
	for i := len(u.modes) - 1; i >= 0; i-- {
		if err := os.Chmod(u.modes[i].path, u.modes[i].mode); err != nil {
			return err
		}
	}
	return nil
}

func (u *unpacker) entry(t *tar.Reader, h *tar.Header) error {
	clean := path.Clean(h.Name)
	if !filepath.IsLocal(clean) || clean == "." || strings.ContainsRune(clean, filepath.Separator) && filepath.Separator != '/' {
		return errors.New("the name leads outside")
	}
	top, rest, below := strings.Cut(clean, "/")
	switch {
	case u.top == "":
		if below {
			return errors.New("the archive does not begin with its top entry")
		}
		u.top, u.folder = top, h.Typeflag == tar.TypeDir
	case top != u.top || !below:
		return errors.New("the archive has a second top entry")
	case !u.folder:
		return errors.New("the top entry is not a folder")
	}
	name := filepath.Join(u.dir, filepath.FromSlash(rest))
	mode0 := h.FileInfo().Mode().Perm() &^ 0o022
	switch h.Typeflag {
	case tar.TypeDir:
		if err := os.Mkdir(name, 0o700); err != nil {
			return err
		}
		u.modes = append(u.modes, mode{name, mode0 | 0o700})
		return nil
	case tar.TypeReg:
		if h.Size > u.o.MaxBytes-u.bytes {
			return fmt.Errorf("the copy would have more than %d bytes", u.o.MaxBytes)
		}
		u.bytes += h.Size
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode0|0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, t)
		if err == nil {
			err = f.Chmod(mode0)
		}
		return errors.Join(err, f.Close())
	case tar.TypeSymlink:
		// Links are written after all entries are read, so only folders and files of this
		// archive exist now.
		if _, err := os.Lstat(filepath.Dir(name) + string(filepath.Separator)); err != nil {
			return err
		}
		if len(h.Linkname) > maxPath {
			u.o.Skipped(clean, "the link is too long")
			return nil
		}
		if !u.o.Links && !inside(rest, h.Linkname) {
			u.o.Skipped(clean, "the link leads outside, to "+h.Linkname)
			return nil
		}
		u.links = append(u.links, link{clean, name, filepath.FromSlash(h.Linkname)})
		return nil
	default:
		u.o.Skipped(clean, "it is neither a file, a folder nor a symbolic link")
		return nil
	}
}

// inside reports whether a link at the path rest, below the top entry, leads to
// something below the top entry, whatever other links exist. It accepts ".." only at
// the beginning of the link's target, because elsewhere it could follow another link.
func inside(rest, to string) bool {
	if rest == "" || to == "" || path.IsAbs(to) || filepath.IsAbs(to) || strings.Contains(to, `\`) {
		return false
	}
	depth := strings.Count(rest, "/")
	parts := strings.Split(to, "/")
	for len(parts) > 0 && (parts[0] == ".." || parts[0] == ".") {
		if parts[0] == ".." {
			depth--
		}
		parts = parts[1:]
	}
	for _, p := range parts {
		if p == ".." {
			return false
		}
	}
	return depth >= 0
}

// place moves the finished copy from its temporary path to target.
func place(from, target string, merge bool) error {
	is, err := os.Lstat(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the top entry was left out
	}
	if err != nil {
		return err
	}
	was, err := os.Lstat(target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return os.Rename(from, target)
	case err != nil:
		return err
	case was.IsDir() && !is.IsDir():
		return fmt.Errorf("%s is a folder", target)
	case was.IsDir() && !merge:
		return fmt.Errorf("%s exists", target)
	case was.IsDir():
		return mergeInto(from, target)
	case is.IsDir():
		return fmt.Errorf("%s exists and is not a folder", target)
	}
	return os.Rename(from, target) // replaces the file, or the link, of that name
}

// mergeInto moves the contents of the folder from into the folder target. It replaces
// links in target and never follows them.
func mergeInto(from, target string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := place(filepath.Join(from, e.Name()), filepath.Join(target, e.Name()), true); err != nil {
			return err
		}
	}
	return nil
}

// removeAll removes a folder, whatever the modes of the folders in it.
func removeAll(dir string) error {
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(p, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}
