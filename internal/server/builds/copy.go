package builds

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/recipe"
	"github.com/wrenn-dev/wrenn/internal/recipe/buildcontext"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/spool"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// file is one entry of a build's folder.
type file struct {
	name, link string
	kind       byte // of a tar header
	mode       int64
	sum        [sha256.Size]byte
}

// copied is the modification time of every copied file. It is constant so that builds are
// reproducible, and not before 1980 in any time zone, because zip archives cannot hold
// earlier dates.
var copied = time.Date(1980, 1, 2, 0, 0, 0, 0, time.UTC)

// selection is the files that a COPY takes and where they go.
type selection struct {
	// target is an absolute path: a folder if folder is set. Otherwise it names a single
	// file, unless the guest has a folder there.
	target string
	folder bool
	mode   *uint32
	// to maps each entry to its paths below target. For a single file, the path is its
	// own name.
	to    map[string][]string
	files map[string]file
}

// folder is a build's uploaded folder, with limits on what all COPYs of the recipe
// together may do.
type folder struct {
	index []file
	all   map[string]file // of index, by name
	// chosen is how many more entries COPYs may take, and work how many more bytes of
	// names they may compare. The server does both before the build begins.
	chosen, work int
}

const (
	maxChosen = 200_000
	maxWork   = 4 << 30
)

func newFolder(index []file) *folder {
	f := &folder{index: index, all: make(map[string]file, len(index)), chosen: maxChosen, work: maxWork}
	for _, e := range index {
		f.all[e.name] = e
	}
	return f
}

var errTooMuch = errors.New("the recipe's COPYs match too many files in too large a folder: copy folders instead of files, or exclude files in .wrennignore")

// compare takes n bytes of comparisons from the limit, or fails.
func (f *folder) compare(n int) error {
	if f.work -= n; f.work < 0 {
		return errTooMuch
	}
	return nil
}

// selectFiles finds what a COPY takes.
func (f *folder) selectFiles(c *recipe.Copy, dir string, lookup func(string) (string, bool)) (_ *selection, owner string, err error) {
	target, err := c.Target.Expand(lookup)
	if err != nil {
		return nil, "", err
	}
	if target == "" {
		return nil, "", &recipe.Error{Pos: c.Pos, Message: "COPY has an empty target after expanding its variables"}
	}
	if c.Owner != nil {
		if owner, err = c.Owner.Expand(lookup); err != nil {
			return nil, "", err
		}
	}
	if owner == "" {
		owner = "root:root"
	}
	s := &selection{
		target: target, mode: c.Mode, to: map[string][]string{}, files: map[string]file{},
		folder: len(c.Sources) > 1 || strings.HasSuffix(target, "/") || path.Base(target) == "." || path.Base(target) == "..",
	}
	if !path.IsAbs(target) {
		s.target = path.Join(dir, target)
	}
	s.target = path.Clean(s.target)
	for _, word := range c.Sources {
		source, err := word.Expand(lookup)
		if err != nil {
			return nil, "", err
		}
		if slices.Contains(strings.Split(source, "/"), "..") {
			return nil, "", &recipe.Error{Pos: word.Pos, Message: "COPY's sources cannot contain .."}
		}
		pattern := strings.TrimPrefix(path.Clean("/"+source), "/")
		err = f.compare(8 * len(source)) // for expanding, cleaning and splitting it
		found := false
		if err == nil {
			found, err = f.find(s, pattern)
		}
		if err == nil && !found {
			err = fmt.Errorf("the folder has no %.200q", source)
		}
		if errors.Is(err, path.ErrBadPattern) {
			err = fmt.Errorf("%.200q is not a pattern", source)
		}
		if err != nil {
			return nil, "", &recipe.Error{Pos: word.Pos, Message: err.Error()}
		}
	}
	return s, owner, nil
}

// find adds the entries that a source matches to s and reports whether there are any.
func (f *folder) find(s *selection, pattern string) (found bool, err error) {
	switch {
	case pattern == "":
		return true, f.takeBelow(s, "")
	case strings.ContainsAny(pattern, `*?[\`):
		s.folder = s.folder || strings.ContainsAny(pattern, `*?[`)
		if _, err := path.Match(pattern, ""); err != nil {
			return false, err
		}
		for _, e := range f.index {
			// A star is tried at each position of the name, with the rest of the pattern.
			if err := f.compare(len(e.name) * len(pattern)); err != nil {
				return false, err
			}
			if match, _ := path.Match(pattern, e.name); match {
				found = true
				if err := f.take(s, e); err != nil {
					return false, err
				}
			}
		}
	default:
		e, is := f.all[pattern]
		if is {
			return true, f.take(s, e)
		}
	}
	if found {
		return true, nil
	}
	// An ignored folder of which the archive has only some files has no entry itself.
	folder := s.folder
	before := f.chosen
	err = f.takeBelow(s, pattern+"/")
	if found = f.chosen < before; !found {
		s.folder = folder
	}
	return found, err
}

// take adds a source. If it is a folder, take adds its content.
func (f *folder) take(s *selection, e file) error {
	name := path.Base(e.name)
	// Docker also follows a link that is itself a source.
	for range 16 {
		if e.kind != tar.TypeSymlink {
			break
		}
		next := path.Join(path.Dir(e.name), e.link)
		to, ok := f.all[next]
		if !ok {
			return fmt.Errorf("%.200q links to a file that the folder does not have", e.name)
		}
		e = to
	}
	if e.kind == tar.TypeDir {
		return f.takeBelow(s, e.name+"/")
	}
	return f.add(s, e, name)
}

func (f *folder) takeBelow(s *selection, prefix string) error {
	s.folder = true
	for _, e := range f.index {
		if err := f.compare(16 + len(prefix)); err != nil {
			return err
		}
		if rel, ok := strings.CutPrefix(e.name, prefix); ok {
			if err := f.add(s, e, rel); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *folder) add(s *selection, e file, to string) error {
	if f.chosen--; f.chosen < 0 {
		return errTooMuch
	}
	if !slices.Contains(s.to[e.name], to) {
		s.to[e.name] = append(s.to[e.name], to)
		s.files[e.name] = e
	}
	return nil
}

// digest hashes what is copied: contents, names, modes and modification time.
func (s *selection) digest() string {
	var parts []string
	for name, to := range s.to {
		f := s.files[name]
		for _, t := range to {
			parts = append(parts, fmt.Sprintf("%q %c %o %q %x", t, f.kind, f.mode, f.link, f.sum))
		}
	}
	slices.Sort(parts)
	sum := digest(append(parts, copied.String())...)
	return hex.EncodeToString(sum[:])
}

// write writes the selected files of an archive as a tar. If name is not empty, it is the
// name of the selection's only file.
func (s *selection) write(ctx context.Context, w io.Writer, archive io.Reader, want buildcontext.Digest, limits buildcontext.Limits, name string) error {
	t := tar.NewWriter(w)
	err := buildcontext.Read(ctx, archive, want, limits, func(h *tar.Header, content io.Reader) error {
		for i, to := range s.to[h.Name] {
			if name != "" {
				to = name
			}
			out := &tar.Header{Name: to, Typeflag: h.Typeflag, Mode: h.Mode, Linkname: h.Linkname, ModTime: copied, Format: tar.FormatPAX}
			if s.mode != nil && h.Typeflag != tar.TypeSymlink {
				out.Mode = int64(*s.mode)
			}
			switch {
			case h.Typeflag == tar.TypeDir:
				out.Name += "/"
			case h.Typeflag == tar.TypeReg && i > 0:
				out.Typeflag, out.Linkname = tar.TypeLink, s.to[h.Name][0] // because its content can be read only once
			case h.Typeflag == tar.TypeReg:
				out.Size = h.Size
			}
			if err := t.WriteHeader(out); err != nil {
				return err
			}
			if out.Size > 0 {
				if _, err := io.Copy(t, content); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return t.Close()
}

// chunkSize is how many bytes of an archive one row holds.
const chunkSize = 1 << 20

// PutArchive stores the archive of a folder for a team's builds. want must be the digest
// of its content, and the archive must have the form that buildcontext packs. PutArchive
// takes a database connection only after the whole archive has arrived and is valid.
func (s *Service) PutArchive(ctx context.Context, team uuid.UUID, want string, body spool.Body) error {
	if n, err := s.Store.UseArchive(ctx, db.UseArchiveParams{TeamID: team, Digest: want}); err != nil {
		return fmt.Errorf("look up archive: %w", err)
	} else if n > 0 {
		return nil
	}
	has, err := s.Store.SizeOfArchives(ctx, team)
	if err != nil {
		return fmt.Errorf("measure archives: %w", err)
	}
	left := s.TeamArchivesMiB<<20 - has
	if left <= 0 {
		return s.archivesFull()
	}
	payer, err := s.Store.GetTeamPayer(ctx, team)
	if err != nil {
		return fmt.Errorf("look up the team's owner: %w", err)
	}
	file, err := s.Spool.Receive(payer, body, min(left, s.ArchiveMiB<<20))
	var long *spool.TooLong
	switch {
	case errors.As(err, &long) && long.Most == left:
		return s.archivesFull()
	case errors.As(err, &long):
		return fault.Because(err, fault.PayloadTooLarge, "the folder is larger than %d MiB: exclude files in .wrennignore", long.Most>>20)
	case err != nil:
		return err
	}
	defer file.Close()
	err = buildcontext.Read(ctx, file, buildcontext.Digest(want), s.limits(), func(*tar.Header, io.Reader) error { return nil })
	if errors.Is(err, buildcontext.ErrRefused) || errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fault.Because(err, fault.InvalidArgument, "invalid archive: %v", err)
	}
	if err == nil {
		err = s.keep(ctx, team, want, file)
	}
	var f *fault.Error
	if err != nil && !errors.As(err, &f) {
		return fmt.Errorf("store archive: %w", err)
	}
	return err
}

func (s *Service) archivesFull() error {
	return fault.New(fault.Conflict, "the team's uploaded folders have reached the limit of %d MiB; the server deletes each one some time after its last use", s.TeamArchivesMiB)
}

// keep stores an archive in rows of one size. It writes few archives at once, so that
// connections stay free for others.
func (s *Service) keep(ctx context.Context, team uuid.UUID, digest string, file *spool.File) error {
	select {
	case s.keeping <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-s.keeping }()
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	add := db.AddArchiveParams{TeamID: team, Digest: digest}
	// Check the quota before writing the archive. Roll this transaction back, because a
	// charge blocks the team until its transaction ends.
	err := s.Store.InTx(ctx, func(q *db.Queries) error {
		if n, err := q.AddArchive(ctx, add); err != nil || n == 0 {
			return err // n = 0: a concurrent request uploaded the same
		}
		if err := s.charge(ctx, q, team, digest, file.Size()); err != nil {
			return err
		}
		return errRoom
	})
	if !errors.Is(err, errRoom) {
		return err
	}
	return s.Store.InTx(ctx, func(q *db.Queries) error {
		if n, err := q.AddArchive(ctx, add); err != nil || n == 0 {
			return err
		}
		if err := writeChunks(ctx, q, team, digest, file); err != nil {
			return err
		}
		return s.charge(ctx, q, team, digest, file.Size())
	})
}

// errRoom rolls back the transaction that only checked the quota.
var errRoom = errors.New("the archive fits the quota")

// charge sets an archive's size, which counts towards the team's quota. It fails if the
// team exceeds its limit. Call it last in a transaction.
func (s *Service) charge(ctx context.Context, q *db.Queries, team uuid.UUID, digest string, size int64) error {
	// Concurrent uploads of a team must see each other's sizes.
	if err := q.LockLimit(ctx, db.LockLimitParams{What: "archives", TeamID: team}); err != nil {
		return err
	}
	if err := q.SetArchiveSize(ctx, db.SetArchiveSizeParams{TeamID: team, Digest: digest, SizeBytes: size}); err != nil {
		return err
	}
	all, err := q.SizeOfArchives(ctx, team)
	if err != nil {
		return err
	}
	if all > s.TeamArchivesMiB<<20 {
		return s.archivesFull()
	}
	return nil
}

func writeChunks(ctx context.Context, q *db.Queries, team uuid.UUID, digest string, file io.Reader) error {
	buf := make([]byte, chunkSize)
	for number := int32(1); ; number++ {
		n, err := io.ReadFull(file, buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		if err := q.AddArchiveChunk(ctx, db.AddArchiveChunkParams{TeamID: team, Digest: digest, Number: number, Data: buf[:n]}); err != nil {
			return err
		}
	}
}

// limits returns the limits for unpacking an archive.
func (s *Service) limits() buildcontext.Limits {
	return buildcontext.Limits{Bytes: s.ArchiveMiB << 20}
}

// archive reads a stored archive chunk by chunk.
type archive struct {
	ctx    context.Context
	store  *store.Store
	team   uuid.UUID
	digest string

	number int32
	rest   []byte
}

func (a *archive) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		a.number++
		data, err := a.store.GetArchiveChunk(a.ctx, db.GetArchiveChunkParams{TeamID: a.team, Digest: a.digest, Number: a.number})
		if errors.Is(err, store.ErrNoRows) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, fmt.Errorf("read archive: %w", err)
		}
		a.rest = data
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// index lists the entries of a build's folder.
func (s *Service) index(ctx context.Context, row db.Build) ([]file, error) {
	if row.Archive == nil {
		return nil, nil
	}
	var all []file
	err := buildcontext.Read(ctx, s.archive(ctx, row), buildcontext.Digest(*row.Archive), s.limits(), func(h *tar.Header, content io.Reader) error {
		f := file{name: h.Name, link: h.Linkname, kind: h.Typeflag, mode: h.Mode & 0o777}
		if h.Typeflag == tar.TypeReg {
			sum := sha256.New()
			if _, err := io.Copy(sum, content); err != nil {
				return err
			}
			sum.Sum(f.sum[:0])
		}
		all = append(all, f)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the build's folder: %w", err)
	}
	return all, nil
}

func (s *Service) archive(ctx context.Context, row db.Build) io.Reader {
	return &archive{ctx: ctx, store: s.Store, team: row.TeamID, digest: *row.Archive}
}
