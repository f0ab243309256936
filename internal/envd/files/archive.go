package files

import (
	"archive/tar"
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/wrenn-dev/wrenn/internal/envd/account"
	"github.com/wrenn-dev/wrenn/internal/envd/fault"
)

// pack responds with a tar of a file or a folder. Names in it start with the base name
// of the path.
func pack(w http.ResponseWriter, r *http.Request) {
	who, root, err := requested(r)
	if err != nil {
		fault.WriteError(w, err)
		return
	}
	// Errors must be found before the status is sent.
	err = who.Do(func() error {
		info, err := os.Stat(root)
		if err != nil {
			return err
		}
		if !info.IsDir() && !info.Mode().IsRegular() {
			return notRegular(root)
		}
		f, err := os.Open(root)
		if err != nil {
			return err
		}
		return f.Close()
	})
	if err != nil {
		fault.WriteError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-tar")
	if r.Method == http.MethodHead {
		return
	}
	sent := &begun{Writer: w}
	out := bufio.NewWriterSize(sent, buffer)
	t := tar.NewWriter(out)
	err = who.Do(func() error { return packTree(r, t, root) })
	if err == nil {
		err = t.Close()
	}
	if err == nil {
		err = out.Flush()
	}
	switch {
	case err != nil && !sent.yes:
		fault.WriteError(w, err)
	case err != nil:
		panic(http.ErrAbortHandler) // breaks the connection, so that the client notices
	}
}

// begun is a writer that knows whether anything was written.
type begun struct {
	io.Writer
	yes bool
}

func (b *begun) Write(p []byte) (int, error) {
	b.yes = true
	return b.Writer.Write(p)
}

// packTree writes the tree at root, with the rights of the calling thread. It follows a
// symbolic link at root itself, but keeps links below it. It leaves out sockets, pipes and
// devices.
func packTree(r *http.Request, t *tar.Writer, root string) error {
	names := account.LoadNames()
	base := path.Base(root)
	real, err := filepath.EvalSymlinks(root)
	if err != nil {
		return err
	}
	buf := make([]byte, buffer)
	return filepath.WalkDir(real, func(p string, d fs.DirEntry, err error) error {
		if err == nil {
			err = r.Context().Err()
		}
		if err != nil {
			if p != real && errors.Is(err, fs.ErrNotExist) {
				return nil // removed in the meantime
			}
			return err
		}
		info, err := os.Lstat(p)
		if errors.Is(err, fs.ErrNotExist) && p != real {
			return nil
		}
		if err != nil {
			return err
		}
		name := base
		if rel, err := filepath.Rel(real, p); err != nil {
			return err
		} else if rel != "." {
			name = path.Join(base, rel)
		}
		if base == "/" {
			if name = strings.TrimLeft(name, "/"); name == "" {
				return nil
			}
		}
		var f *os.File
		link := ""
		switch {
		case info.IsDir():
		case info.Mode()&fs.ModeSymlink != 0:
			if link, err = os.Readlink(p); err != nil {
				return err
			}
		case info.Mode().IsRegular():
			if f, info, err = openFile(p); err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				return err
			}
			defer f.Close()
			defer endReads(r.Context(), f)()
		default:
			return nil
		}
		h, err := tar.FileInfoHeader(info, link)
		if err != nil {
			return err
		}
		h.Name = name
		if info.IsDir() {
			h.Name += "/"
		}
		h.Format = tar.FormatPAX // times to the nanosecond, names of any length
		h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
		h.Uname, h.Gname = names.User(uint32(h.Uid)), names.Group(uint32(h.Gid))
		var data io.Reader
		if f != nil {
			if data, h.Size, err = sized(f, p); err != nil {
				return err
			}
		}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if data == nil {
			return nil
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{t}, data, buf)
		if err == nil && n < h.Size {
			// The header has the old size, and filling up with zeros would be wrong.
			err = fmt.Errorf("%s was truncated while it was read", p)
		}
		return err
	})
}

// maxUnsized bounds, in bytes, a file whose size the kernel does not report. pack keeps
// it in memory, because an archive has the size before the content.
const maxUnsized = 16 << 20

// sized returns the content of a file and its size in bytes.
func sized(f *os.File, path string) (io.Reader, int64, error) {
	c, err := open(f)
	if err != nil {
		return nil, 0, err
	}
	if c.size >= 0 {
		return c.all(), c.size, nil
	}
	all, err := io.ReadAll(io.LimitReader(c.all(), maxUnsized+1))
	if err != nil {
		return nil, 0, err
	}
	if len(all) > maxUnsized {
		return nil, 0, fmt.Errorf("%s has no size and more than %d bytes: read it by itself", path, maxUnsized)
	}
	return bytes.NewReader(all), int64(len(all)), nil
}

// unpack unpacks a tar into a directory, which it creates.
func unpack(w http.ResponseWriter, r *http.Request) {
	who, dir, err := requested(r)
	var body io.Reader
	if err == nil {
		body, err = decoded(r)
	}
	if err == nil {
		var to *account.Account
		if owner := r.URL.Query().Get("owner"); owner != "" {
			to, err = account.Lookup(owner)
		}
		if err == nil {
			err = who.Do(func() error { return unpackTree(body, dir, to) })
		}
	}
	if err != nil {
		fault.WriteError(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// maxArchived bounds the entries of one archive, because its directories are kept in
// memory until its end.
const maxArchived = 1_000_000

// unpackTree unpacks a tar into dir, with the rights of the calling thread. Because it
// uses os.Root, it touches nothing outside dir, whatever names and links the archive has.
// Files belong to the thread's user and get the archive's modes and times, but no setuid
// and setgid bits. If owner is set, everything belongs to owner and keeps all bits of its
// mode; that needs the right to change owners.
func unpackTree(body io.Reader, dir string, owner *account.Account) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()

	type made struct {
		name string
		mode fs.FileMode
		time time.Time
	}
	var dirs []made
	// give changes the owner and restores the mode, because chown clears bits of it.
	give := func(name string, mode int64) error {
		if owner == nil {
			return nil
		}
		if err := root.Lchown(name, int(owner.UID), int(owner.GID)); err != nil || mode < 0 {
			return confined(err)
		}
		return confined(root.Chmod(name, fileMode(mode)))
	}
	buf := make([]byte, buffer)
	t := tar.NewReader(body)
	for n := 0; ; n++ {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return errors.Join(errClient, fmt.Errorf("read tar: %w", err))
		}
		if n >= maxArchived {
			return fmt.Errorf("more than %d entries in the archive: %w", maxArchived, fs.ErrInvalid)
		}
		name, err := local(h.Name)
		if err != nil {
			return err
		}
		mode := fs.FileMode(h.Mode) & 0o777
		if name != "." {
			if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
				return confined(err)
			}
		}
		switch h.Typeflag {
		case tar.TypeDir:
			if name == "." {
				continue // dir itself stays unchanged
			}
			if info, err := root.Lstat(name); err == nil && !info.IsDir() && info.Mode()&fs.ModeSymlink == 0 {
				if err := root.Remove(name); err != nil {
					return confined(err)
				}
			}
			if err := root.MkdirAll(name, 0o700|mode); err != nil {
				return confined(err)
			}
			if owner != nil {
				mode = fileMode(h.Mode)
				if err := give(name, -1); err != nil {
					return err
				}
			}
			dirs = append(dirs, made{name, mode, h.ModTime})
		case tar.TypeReg, tar.TypeGNUSparse:
			if err := unpackFile(root, name, mode, h.ModTime, clientReader{t}, buf); err != nil {
				return confined(err)
			}
			if err := give(name, h.Mode); err != nil {
				return err
			}
		case tar.TypeSymlink:
			if err := replaceable(root, name); err != nil {
				return confined(err)
			}
			// The target can be anything, because nothing here follows links out of dir.
			if err := root.Symlink(h.Linkname, name); err != nil {
				return confined(err)
			}
			if err := give(name, -1); err != nil {
				return err
			}
		case tar.TypeLink:
			old, err := local(h.Linkname)
			if err != nil {
				return err
			}
			if old == name {
				continue
			}
			if err := replaceable(root, name); err != nil {
				return confined(err)
			}
			if err := root.Link(old, name); err != nil {
				return confined(err)
			}
		case tar.TypeXGlobalHeader:
		default:
			return fmt.Errorf("%s: entries of type %q are not unpacked: %w", h.Name, h.Typeflag, fs.ErrInvalid)
		}
	}
	// Read the rest of the body, so that the connection can be reused.
	if _, err := io.Copy(io.Discard, body); err != nil {
		return err
	}
	// Directories come last, the deepest first, because their mode can forbid writing into
	// them, and writing changes their time.
	for i := len(dirs) - 1; i >= 0; i-- {
		d := dirs[i]
		if err := root.Chmod(d.name, d.mode); err != nil {
			return confined(err)
		}
		if err := root.Chtimes(d.name, d.time, d.time); err != nil {
			return confined(err)
		}
	}
	return nil
}

// fileMode converts a tar header's mode, which has the bits of chmod(2).
func fileMode(bits int64) fs.FileMode {
	mode := fs.FileMode(bits) & fs.ModePerm
	for bit, special := range map[int64]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if bits&bit != 0 {
			mode |= special
		}
	}
	return mode
}

// local returns an entry's name as a path below the root. As in tar, a leading slash does
// not count.
func local(name string) (string, error) {
	if strings.ContainsRune(name, 0) {
		return "", fmt.Errorf("an entry's name has a NUL byte: %w", fs.ErrInvalid)
	}
	p := strings.TrimLeft(name, "/")
	if p == "" {
		p = "."
	}
	for part := range strings.SplitSeq(p, "/") {
		if part == ".." {
			return "", fmt.Errorf("entry %q leads out of the folder: %w", name, fs.ErrInvalid)
		}
	}
	return path.Clean(p), nil
}

// replaceable removes the file at name, unless it is a directory.
func replaceable(root *os.Root, name string) error {
	info, err := root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.IsDir() {
		return &fs.PathError{Op: "replace", Path: name, Err: fs.ErrExist}
	}
	return root.Remove(name)
}

// unpackFile creates a file, replacing an existing one, and removes it if its content is
// incomplete.
func unpackFile(root *os.Root, name string, mode fs.FileMode, at time.Time, from io.Reader, buf []byte) error {
	if err := replaceable(root, name); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{f}, struct{ io.Reader }{from}, buf)
	if err == nil {
		err = f.Chmod(mode)
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = root.Chtimes(name, at, at)
	}
	if err != nil {
		_ = root.Remove(name)
	}
	return err
}

// confined marks os.Root's refusal to leave the folder as the client's fault. The standard
// library does not export that error.
func confined(err error) error {
	if err == nil {
		return nil
	}
	if strings.Contains(err.Error(), "path escapes from parent") {
		return fmt.Errorf("%w: %w", err, fs.ErrInvalid)
	}
	return err
}
