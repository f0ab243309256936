package filesystem

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

type unixStat = syscall.Stat_t

// move renames source to destination, and creates destination's parents. Between two file
// systems it copies to a temporary name, renames that, and removes the source.
func move(source, destination string) error {
	if _, err := os.Lstat(source); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(destination), 0o755); err != nil {
		return err
	}
	err := os.Rename(source, destination)
	if !errors.Is(err, unix.EXDEV) {
		return err
	}
	if source == destination || strings.HasPrefix(destination, source+"/") {
		return &fs.PathError{Op: "move", Path: source, Err: unix.EINVAL}
	}
	temp, err := os.MkdirTemp(filepath.Dir(destination), ".wrenn-move-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	copied := filepath.Join(temp, "copy")
	if err := duplicate(source, copied); err != nil {
		return err
	}
	if err := os.Rename(copied, destination); err != nil {
		return err
	}
	return os.RemoveAll(source)
}

// duplicate copies a tree of directories, files and symbolic links with their
// modes and times.
func duplicate(source, target string) error {
	info, err := os.Lstat(source)
	if err != nil {
		return err
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		to, err := os.Readlink(source)
		if err != nil {
			return err
		}
		return os.Symlink(to, target)
	case info.IsDir():
		if err := os.Mkdir(target, 0o700); err != nil {
			return err
		}
		children, err := os.ReadDir(source)
		if err != nil {
			return err
		}
		for _, c := range children {
			if err := duplicate(filepath.Join(source, c.Name()), filepath.Join(target, c.Name())); err != nil {
				return err
			}
		}
	case info.Mode().IsRegular():
		if err := duplicateFile(source, target); err != nil {
			return err
		}
	default:
		return &fs.PathError{Op: "copy to another file system", Path: source, Err: unix.EINVAL}
	}
	if st, ok := info.Sys().(*unixStat); ok {
		// Keep the owner if the user may.
		_ = os.Lchown(target, int(st.Uid), int(st.Gid))
	}
	if err := os.Chmod(target, info.Mode()); err != nil {
		return err
	}
	return os.Chtimes(target, info.ModTime(), info.ModTime())
}

func duplicateFile(source, target string) error {
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(target, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
