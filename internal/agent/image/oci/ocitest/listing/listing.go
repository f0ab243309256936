// Package listing describes root file systems, so that tests can compare them.
package listing

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Of returns a line for each file of a root file system, which begins with its quoted name
// and has all its properties. It leaves out the times of folders, in which tools differ,
// and mounted file systems.
func Of(root string) (lines []string, err error) {
	var top unix.Stat_t
	if err := unix.Lstat(root, &top); err != nil {
		return nil, err
	}
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		if st.Dev != top.Dev && d.IsDir() {
			return fs.SkipDir
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%q mode %o owner %d:%d", rel, st.Mode, st.Uid, st.Gid)
		if !d.IsDir() {
			line += fmt.Sprintf(" links %d device %x size %d time %d", st.Nlink, st.Rdev, st.Size, st.Mtim.Sec)
		}
		switch {
		case d.Type().IsRegular():
			sum, err := sumOf(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" sha256 %x", sum)
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" to %q", to)
		}
		names := make([]byte, 4096)
		n, err := unix.Llistxattr(p, names)
		if err != nil {
			return err
		}
		attributes := strings.Split(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00")
		slices.Sort(attributes)
		for _, a := range attributes {
			if a == "" {
				continue
			}
			value := make([]byte, 4096)
			n, err := unix.Lgetxattr(p, a, value)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %s=%q", a, value[:n])
		}
		lines = append(lines, line)
		return nil
	})
	return lines, err
}

func sumOf(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return h.Sum(nil), err
}
