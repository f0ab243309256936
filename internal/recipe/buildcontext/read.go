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

// ErrRefused is the error, wrapped, for an archive that Pack would not have made, or that
// has another digest than its name.
var ErrRefused = errors.New("archive refused")

// Limits bound an archive. Zero fields have the values of DefaultLimits.
type Limits struct {
	Entries int
	Bytes   int64 // of all files together
}

// DefaultLimits are enough for a project's sources and its data.
var DefaultLimits = Limits{Entries: 100_000, Bytes: 4 << 30}

// The longest name and link of an archive in bytes, the depth of its folders, and the bytes
// of all names and links together, which readers keep in memory.
const (
	maxName  = 4095 // PATH_MAX, the final NUL aside
	maxDepth = 128
	maxNames = 32 << 20
)

// budget is the unused part of the limits.
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

// entry subtracts one entry from the budget.
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

// Read calls visit for each entry of an archive in order: folders (without a final slash),
// files, whose content visit may read, and symbolic links. It refuses anything that Pack
// would not write. The archive must have the digest want, which Read can only check at the
// end, so the entries are trustworthy only if Read returns nil.
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

// checker refuses entries that Pack would not write.
type checker struct {
	budget *budget
	dirs   map[string]bool // names below which entries may be
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
	// The digest covers all bytes, also the padding.
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

// check checks an entry, and removes the final slash from its name.
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
	// Pack's order excludes duplicates and entries before their folder.
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

// parents adds the folders above dir that have no entry, because they were ignored except
// for something in them.
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

// compare compares two names of an archive in the order of a walk that sorts each folder:
// "a/b" comes before "a.b".
func compare(a, b string) int {
	return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
}
