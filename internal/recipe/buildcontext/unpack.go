package buildcontext

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// ErrRefused is in the error of an archive that Pack would not have made, or
// that is not the one that was named.
var ErrRefused = errors.New("archive refused")

// Limits bound an archive. Zeros stand for DefaultLimits'.
type Limits struct {
	Entries int
	Bytes   int64 // of all files together
}

// DefaultLimits are enough for a project's sources and its data.
var DefaultLimits = Limits{Entries: 100_000, Bytes: 4 << 30}

// The longest name and link, in bytes, and depth of folders of an archive, and the
// bytes of all names and links together, which readers keep.
const (
	maxName  = 4095 // PATH_MAX, the final NUL aside
	maxDepth = 128
	maxNames = 32 << 20
)

// budget is what is left of the limits.
type budget struct {
	limits  Limits
	entries int
	bytes   int64
	names   int
}

func newBudget(l Limits) *budget {
	if l.Entries <= 0 {
		l.Entries = DefaultLimits.Entries
	}
	if l.Bytes <= 0 {
		l.Bytes = DefaultLimits.Bytes
	}
	return &budget{limits: l, entries: l.Entries, bytes: l.Bytes, names: maxNames}
}

// entry takes one entry's share.
func (b *budget) entry(name, link string, size int64) error {
	if b.entries--; b.entries < 0 {
		return fmt.Errorf("more than %d files and folders: %w", b.limits.Entries, ErrRefused)
	}
	if size < 0 || size > b.bytes {
		return fmt.Errorf("files have more than %d bytes together: %w", b.limits.Bytes, ErrRefused)
	}
	b.bytes -= size
	if b.names -= len(name) + len(link); b.names < 0 {
		return fmt.Errorf("names have more than %d bytes together: %w", maxNames, ErrRefused)
	}
	if len(name) > maxName || len(link) > maxName || strings.Count(name, "/") > maxDepth {
		return fmt.Errorf("a name is longer than %d bytes or deeper than %d folders: %w", maxName, maxDepth, ErrRefused)
	}
	return nil
}

// Read calls visit with each entry of an archive, whose name must be want, in
// its order: folders (without the slash), files, which may be read, and symbolic
// links. What Pack does not write is refused; what visit was given counts only
// if Read returns nil.
func Read(ctx context.Context, r io.Reader, want Digest, limits Limits, visit func(h *tar.Header, content io.Reader) error) error {
	sum := sha256.New()
	c := checker{budget: newBudget(limits), dirs: map[string]bool{".": true}}
	if err := c.all(io.TeeReader(contextReader{ctx, r}, sum), visit); err != nil {
		return err
	}
	if got := digestOf(sum.Sum(nil)); subtle.ConstantTimeCompare([]byte(got), []byte(want)) != 1 {
		return fmt.Errorf("it is %s, not %.100q: %w", got, want, ErrRefused)
	}
	return nil
}

// checker refuses what Pack does not write.
type checker struct {
	budget *budget
	dirs   map[string]bool // names that entries have come below, or may
	last   string          // name of the last entry
}

func (c *checker) all(in io.Reader, visit func(*tar.Header, io.Reader) error) error {
	t := tar.NewReader(in)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		if err := c.check(h); err != nil {
			return err
		}
		if err := visit(h, t); err != nil {
			return err
		}
	}
	// The archive's name is of all its bytes.
	const padding = 1 << 20
	n, err := io.Copy(io.Discard, io.LimitReader(in, padding))
	if err != nil {
		return fmt.Errorf("read archive: %w", err)
	}
	if n == padding {
		return fmt.Errorf("there is more behind its end: %w", ErrRefused)
	}
	return nil
}

// check checks an entry, whose name it leaves without a final slash.
func (c *checker) check(h *tar.Header) error {
	if err := c.budget.entry(h.Name, h.Linkname, h.Size); err != nil {
		return err
	}
	name := h.Name
	if h.Typeflag == tar.TypeDir {
		name = strings.TrimSuffix(name, "/")
	}
	if !filepath.IsLocal(name) || strings.ContainsRune(name, 0) || name == "." || path.Clean(name) != name {
		return fmt.Errorf("entry %q is no name below the folder: %w", h.Name, ErrRefused)
	}
	// In the order that Pack writes, none can come twice, and none before its
	// folder.
	if c.last != "" && compare(c.last, name) >= 0 {
		return fmt.Errorf("entry %q comes twice or out of order: %w", h.Name, ErrRefused)
	}
	c.last, h.Name = name, name
	if err := c.parents(path.Dir(name)); err != nil {
		return err
	}
	c.dirs[name] = h.Typeflag == tar.TypeDir
	switch h.Typeflag {
	case tar.TypeDir, tar.TypeReg:
		return nil
	case tar.TypeSymlink:
		if err := checkLink(name, h.Linkname); err != nil {
			return fmt.Errorf("%w: %w", err, ErrRefused)
		}
		if h.Linkname == "" {
			return fmt.Errorf("link %s leads nowhere: %w", name, ErrRefused)
		}
		return nil
	}
	return fmt.Errorf("entry %q is of type %q: %w", h.Name, h.Typeflag, ErrRefused)
}

// parents takes in the folders that the archive has no entry of: those that
// were ignored but for something in them.
func (c *checker) parents(dir string) error {
	is, ok := c.dirs[dir]
	if is {
		return nil
	}
	if ok {
		return fmt.Errorf("%q is not a folder, but has entries: %w", dir, ErrRefused)
	}
	if err := c.parents(path.Dir(dir)); err != nil {
		return err
	}
	c.dirs[dir] = true
	return c.budget.entry(dir, "", 0)
}

// compare is the order of an archive's names, that of a walk which sorts each
// folder: "a/b" comes before "a.b".
func compare(a, b string) int {
	return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
}
