// Package buildcontext packs the folder that a recipe copies from into an archive that is
// named by its content, and reads such archives, which it does not trust.
//
// The archive is a tar (POSIX.1-2001, pax) of folders, files and symbolic links, sorted by
// name, with permission bits and without owners, times and hard links. So the same files
// give the same bytes, whose SHA-256 is the archive's name.
package buildcontext

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
	"golang.org/x/sys/unix"
)

// ignoreFiles list what not to pack, in the format of .dockerignore. The first one that
// exists counts.
var ignoreFiles = []string{".wrennignore", ".dockerignore"}

// Digest names an archive: "sha256:" and 64 hexadecimal digits.
type Digest string

func digestOf(sum []byte) Digest { return Digest("sha256:" + hex.EncodeToString(sum)) }

// Pack writes the content of the folder dir, except ignored files, to w and returns the
// archive's name. It fails for links that lead out of the folder, for anything that is not
// a file, folder or link, and for more or larger files than limits allow.
func Pack(ctx context.Context, w io.Writer, dir string, limits Limits) (Digest, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", fmt.Errorf("pack: %w", err)
	}
	defer root.Close()
	ignored, err := ignorePatterns(root)
	if err != nil {
		return "", fmt.Errorf("pack: %w", err)
	}
	sum := sha256.New()
	p := packer{ctx: ctx, root: root, ignored: ignored, tar: tar.NewWriter(io.MultiWriter(w, sum)), budget: newBudget(limits)}
	if err := p.folder(".", patternmatcher.MatchInfo{}); err != nil {
		return "", fmt.Errorf("pack %s: %w", dir, err)
	}
	if err := p.tar.Close(); err != nil {
		return "", fmt.Errorf("pack %s: %w", dir, err)
	}
	return digestOf(sum.Sum(nil)), nil
}

func ignorePatterns(root *os.Root) (*patternmatcher.PatternMatcher, error) {
	for _, name := range ignoreFiles {
		f, err := root.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		patterns, err := ignorefile.ReadAll(io.LimitReader(f, 1<<20))
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		m, err := patternmatcher.New(patterns)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		return m, nil
	}
	return patternmatcher.New(nil)
}

type packer struct {
	ctx     context.Context
	root    *os.Root
	ignored *patternmatcher.PatternMatcher
	tar     *tar.Writer
	budget  *budget
}

// folder packs the content of a folder, whose own entry is already written.
func (p *packer) folder(dir string, parent patternmatcher.MatchInfo) error {
	f, err := p.root.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	entries, err := f.ReadDir(-1)
	f.Close()
	if err != nil {
		return err
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		if err := p.ctx.Err(); err != nil {
			return err
		}
		name := path.Join(dir, e.Name())
		skip, info, err := p.ignored.MatchesUsingParentResults(name, parent)
		if err != nil {
			return fmt.Errorf("match %s: %w", name, err)
		}
		// An ignored folder may have entries that are excepted from that.
		if skip && !(e.IsDir() && p.ignored.Exclusions()) {
			continue
		}
		if err := p.entry(name, info, skip); err != nil {
			return err
		}
	}
	return nil
}

func (p *packer) entry(name string, match patternmatcher.MatchInfo, skip bool) error {
	info, err := p.root.Lstat(name)
	if err != nil {
		return err
	}
	h := &tar.Header{Name: name, Mode: int64(info.Mode().Perm()), Format: tar.FormatPAX}
	switch {
	case info.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
		if !skip {
			if err := p.header(h); err != nil {
				return err
			}
		}
		return p.folder(name, match)
	case info.Mode()&fs.ModeSymlink != 0:
		h.Typeflag, h.Mode = tar.TypeSymlink, 0o777
		if h.Linkname, err = p.root.Readlink(name); err != nil {
			return err
		}
		if err := checkLink(name, h.Linkname); err != nil {
			return err
		}
		return p.header(h)
	case info.Mode().IsRegular():
		return p.file(name, h)
	}
	return fmt.Errorf("%s is neither a file, a folder nor a link: list it in %s", name, ignoreFiles[0])
}

func (p *packer) header(h *tar.Header) error {
	if err := p.budget.entry(h.Name, h.Linkname, h.Size); err != nil {
		return err
	}
	return p.tar.WriteHeader(h)
}

func (p *packer) file(name string, h *tar.Header) error {
	f, err := p.root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s changed while it was read", name)
	}
	h.Typeflag, h.Mode, h.Size = tar.TypeReg, int64(info.Mode().Perm()), info.Size()
	if err := p.header(h); err != nil {
		return err
	}
	n, err := io.Copy(p.tar, io.LimitReader(contextReader{p.ctx, f}, h.Size))
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if n < h.Size {
		return fmt.Errorf("%s changed while it was read", name)
	}
	return nil
}

// checkLink refuses a symbolic link that leads out of the packed folder, or could through
// another link. So it accepts ".." only at the beginning of the target, because the
// folders above a link are not links themselves.
func checkLink(name, target string) error {
	out := path.IsAbs(target)
	up, named := 0, false
	for part := range strings.SplitSeq(target, "/") {
		switch part {
		case "", ".":
		case "..":
			up++
			out = out || named
		default:
			named = true
		}
	}
	if out || up > strings.Count(name, "/") {
		return fmt.Errorf("link %s leads out of the folder, to %q", name, target)
	}
	return nil
}

type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(b)
}
