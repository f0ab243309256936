package agent

import (
	"bufio"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/image/oci"
	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/room"
)

const (
	// maxImports is the number of images that are unpacked at once. All teams of one
	// owner together get at most all but one of these places.
	maxImports = 2
	// Spooled images may take 1/spoolShare of the disk's free space, and those of one
	// owner 1/payerShare of that.
	spoolShare, payerShare = 2, 4
	// maxReference bounds a reference, a tag, a user's name and a password.
	maxReference = 4096
)

// imports tracks the running imports and bounds what they take.
type imports struct {
	mu      sync.Mutex
	running map[uuid.UUID]*importing
	// taken counts places by payer. give closes freed and replaces it.
	taken map[string]int
	freed chan struct{}
	// spooled counts the reserved bytes of disk by payer.
	spooled map[string]int64
}

// importing is a running import.
type importing struct {
	off  func(why error) // cancels it
	done chan struct{}   // closed when it has ended
}

// errRemoved is the cause with which end cancels an import.
var errRemoved = connect.NewError(connect.CodeAborted, clienterr.New("the template was deleted during its import"))

// end cancels the template's import, if one runs, and waits until it has ended.
func (i *imports) end(ctx context.Context, template uuid.UUID) error {
	i.mu.Lock()
	is := i.running[template]
	i.mu.Unlock()
	if is == nil {
		return nil
	}
	is.off(errRemoved)
	select {
	case <-is.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// enter registers the caller's import of a template, after any earlier one has ended.
// off cancels the caller's import. The caller must call leave when it has ended.
func (i *imports) enter(ctx context.Context, off func(error), template uuid.UUID) (leave func(), err error) {
	i.mu.Lock()
	for i.running[template] != nil {
		other := i.running[template].done
		i.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		i.mu.Lock()
	}
	if i.running == nil {
		i.running = map[uuid.UUID]*importing{}
	}
	done := make(chan struct{})
	i.running[template] = &importing{off, done}
	i.mu.Unlock()
	return func() {
		i.mu.Lock()
		delete(i.running, template)
		i.mu.Unlock()
		close(done)
	}, nil
}

// take waits for a place for payer. A caller must hold no place while it waits for
// a registry or a client, either of which may be slow.
func (i *imports) take(ctx context.Context, payer string) error {
	for {
		i.mu.Lock()
		if i.taken == nil {
			i.taken, i.freed = map[string]int{}, make(chan struct{})
		}
		all := 0
		for _, n := range i.taken {
			all += n
		}
		if all < maxImports && i.taken[payer] < maxImports-1 {
			i.taken[payer]++
			i.mu.Unlock()
			return nil
		}
		freed := i.freed
		i.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// give releases a place that take acquired.
func (i *imports) give(payer string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.taken[payer]--; i.taken[payer] == 0 {
		delete(i.taken, payer)
	}
	close(i.freed)
	i.freed = make(chan struct{})
}

// spool reserves disk space for the bytes that one import receives. It is not safe for
// concurrent use.
type spool struct {
	imports *imports
	payer   string
	room    int64 // free bytes of the disk when the import began
	held    int64 // bytes reserved
}

// reserve reserves n more bytes. The caller must write them only if it succeeds.
func (s *spool) reserve(n int64) error {
	i := s.imports
	i.mu.Lock()
	defer i.mu.Unlock()
	all := n
	for _, b := range i.spooled {
		all += b
	}
	if all > s.room/spoolShare || i.spooled[s.payer]+n > s.room/spoolShare/payerShare {
		return connect.NewError(connect.CodeResourceExhausted, clienterr.New("this host has not enough disk space for the image now"))
	}
	if i.spooled == nil {
		i.spooled = map[string]int64{}
	}
	i.spooled[s.payer] += n
	s.held += n
	return nil
}

// free releases everything that was reserved.
func (s *spool) free() {
	i := s.imports
	i.mu.Lock()
	defer i.mu.Unlock()
	if s.held == 0 {
		return // spooled may be nil
	}
	if i.spooled[s.payer] -= s.held; i.spooled[s.payer] == 0 {
		delete(i.spooled, s.payer)
	}
	s.held = 0
}

// writer returns a writer that reserves bytes before it writes them to w.
func (s *spool) writer(w io.Writer) io.Writer { return spoolWriter{s, w} }

type spoolWriter struct {
	spool *spool
	to    io.Writer
}

func (w spoolWriter) Write(p []byte) (int, error) {
	if err := w.spool.reserve(int64(len(p))); err != nil {
		return 0, err
	}
	return w.to.Write(p)
}

// ImportTemplate implements hostagentv1connect.HostAgentHandler.
func (s *service) ImportTemplate(ctx context.Context, stream *connect.ClientStream[pb.ImportTemplateRequest]) (*connect.Response[pb.ImportTemplateResponse], error) {
	if !stream.Receive() {
		if err := stream.Err(); err != nil {
			return nil, err
		}
		return nil, invalid("the first message must be start")
	}
	start := stream.Msg().GetStart()
	if start == nil {
		return nil, invalid("the first message must be start")
	}
	t, err := importedTemplate(start)
	if err != nil {
		return nil, err
	}
	// An agent that stops cancels and undoes its imports.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	off := func(why error) { cancel(why); endReceiving(ctx) }
	ended := make(chan struct{})
	defer func() { cancel(nil); <-ended }()
	go func() {
		defer close(ended)
		select {
		case <-s.stopping:
			off(sandbox.ErrClosing)
		case <-ctx.Done():
		}
	}()
	begin := time.Now()
	made, sum, err := s.importTemplate(ctx, off, start, t, &chunks{stream: stream})
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		endReceiving(ctx)
		return nil, s.fault(ctx, "import image", err)
	}
	s.log.InfoContext(ctx, "image imported", "template", start.GetTemplateId(), "name", t.Name, "digest", sum, "took", time.Since(begin))
	return connect.NewResponse(&pb.ImportTemplateResponse{Template: templateMessage(made), Digest: sum}), nil
}

// importedTemplate checks a request and returns the template that it asks for.
func importedTemplate(m *pb.ImportTemplateRequest_Start) (t image.Template, err error) {
	t = image.Template{Name: m.GetName(), DiskMiB: int(m.GetDiskMib())}
	if t.ID, err = parse(id.Template, "template_id", m.GetTemplateId()); err != nil {
		return t, err
	}
	if t.Team, err = parse(id.Team, "team_id", m.GetTeamId()); err != nil {
		return t, err
	}
	if t.DiskMiB == 0 {
		t.DiskMiB = hostwire.DefaultDiskMiB
	}
	switch {
	case t.ID == uuid.Nil:
		return t, invalid("template_id: the built-in template cannot be replaced")
	case t.Name == "" || len(t.Name) > maxName:
		return t, invalid("name: must have 1 to %d bytes", maxName)
	case t.DiskMiB < 1 || t.DiskMiB > sandbox.MaxDiskMiB:
		return t, invalid("disk_mib: must be between 1 and %d", sandbox.MaxDiskMiB)
	case m.GetSource() == nil:
		return t, invalid("source: must be a registry or an archive")
	case len(m.GetPayer()) > maxName:
		return t, invalid("payer: must have %d bytes at most", maxName)
	case len(m.GetArchive().GetTag()) > maxReference:
		return t, invalid("tag: must have %d bytes at most", maxReference)
	case (m.GetVcpus() == 0) != (m.GetMemoryMib() == 0):
		return t, invalid("vcpus and memory_mib: set both or neither")
	}
	if r := m.GetRegistry(); r != nil {
		return t, checkRegistry(r)
	}
	return t, nil
}

func checkRegistry(r *pb.ImportTemplateRequest_Registry) error {
	switch {
	case r.GetReference() == "":
		return invalid("reference: must not be empty")
	case max(len(r.GetReference()), len(r.GetUsername()), len(r.GetPassword())) > maxReference:
		return invalid("reference, username, password: must have %d bytes at most", maxReference)
	case r.GetUsername() == "" && r.GetPassword() != "":
		return invalid("username: required with a password")
	}
	return nil
}

// access returns the credentials and restrictions for a request to a registry.
func (s *service) access(r *pb.ImportTemplateRequest_Registry) oci.Access {
	return oci.Access{Username: r.GetUsername(), Password: r.GetPassword(), Loopback: s.cfg.LocalRegistries, Private: s.cfg.PrivateRegistries}
}

// resolveTimeout bounds the resolution of a reference by its registry.
const resolveTimeout = time.Minute

// ResolveImage implements hostagentv1connect.HostAgentHandler.
func (s *service) ResolveImage(ctx context.Context, req *connect.Request[pb.ResolveImageRequest]) (*connect.Response[pb.ResolveImageResponse], error) {
	r := req.Msg.GetRegistry()
	if err := checkRegistry(r); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	pinned, err := oci.Pin(ctx, r.GetReference(), s.access(r))
	if err != nil {
		return nil, s.fault(ctx, "resolve image", blame(true, err))
	}
	return connect.NewResponse(&pb.ResolveImageResponse{Pinned: pinned}), nil
}

// importTemplate imports an image as template t unless t exists, and captures it if the
// request has a VM size. If it fails, no part of the template remains.
func (s *service) importTemplate(ctx context.Context, off func(error), m *pb.ImportTemplateRequest_Start, t image.Template, archive io.Reader) (_ image.Template, sum string, err error) {
	leave, err := s.imports.enter(ctx, off, t.ID)
	if err != nil {
		return t, "", err
	}
	defer leave()
	payer := cmp.Or(m.GetPayer(), t.Team.String())
	made, err := image.Find(s.cfg.Dir, t.Team, t.ID)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return t, "", err
	}
	var img *oci.Image
	discard := func() error { return nil }
	if missing {
		if img, discard, err = s.fetchImage(ctx, m, t, payer, archive); err != nil {
			return t, "", err
		}
	}
	if err := s.imports.take(ctx, payer); err != nil {
		return t, "", errors.Join(err, discard())
	}
	defer s.imports.give(payer)
	if missing {
		made, sum, err = s.importImage(ctx, m, t, img)
		if err := errors.Join(err, discard()); err != nil {
			return t, "", err
		}
	}
	if m.GetVcpus() > 0 {
		if err := s.sandboxes.Prepare(ctx, made, int(m.GetVcpus()), int(m.GetMemoryMib())); err != nil {
			return t, "", errors.Join(err, s.sandboxes.DeleteTemplate(t.Team, t.ID))
		}
		if made, err = image.Find(s.cfg.Dir, t.Team, t.ID); err != nil { // its size has changed
			return t, "", err
		}
	}
	return made, sum, nil
}

// fetchImage spools the image to disk, so that no other import waits for a slow sender.
// The function that it returns closes the image and removes its files.
func (s *service) fetchImage(ctx context.Context, m *pb.ImportTemplateRequest_Start, t image.Template, payer string, archive io.Reader) (_ *oci.Image, _ func() error, err error) {
	disk := s.sandboxes.Room()
	left, err := disk.Left()
	if err != nil {
		return nil, nil, err
	}
	tmp, err := image.TempTemplate(s.cfg.Dir)
	if err != nil {
		return nil, nil, sandbox.Full(err)
	}
	held := &spool{imports: &s.imports, payer: payer, room: left}
	undo := []func() error{func() error { held.free(); return nil }, func() error { return os.RemoveAll(tmp) }}
	done := func() error {
		var errs []error
		for _, f := range slices.Backward(undo) {
			errs = append(errs, f())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, done())
		}
	}()
	// Twice the disk: layers may be uncompressed, and upper ones replace files of lower ones.
	limits := oci.Limits{Bytes: 2 * int64(t.DiskMiB) << 20, Room: disk}
	if r := m.GetRegistry(); r != nil {
		img, err := oci.Registry(ctx, r.GetReference(), s.access(r))
		if err != nil {
			return nil, nil, blame(true, err)
		}
		undo = append(undo, img.Close)
		// First, because an image that can never fit needs an error that is not retried.
		if err := img.Fits(limits); err != nil {
			return nil, nil, blame(true, err)
		}
		if err := held.reserve(img.Packed()); err != nil {
			return nil, nil, err
		}
		return img, done, blame(true, img.Fetch(ctx, tmp, limits))
	}
	file := filepath.Join(tmp, "archive.tar")
	if limits.Packed, err = keep(file, archive, limits.Bytes, disk, held); err != nil {
		return nil, nil, sandbox.Full(err)
	}
	limits.Bytes = min(limits.Bytes, oci.Unpackable(limits.Packed))
	limits.Reserve = held.reserve
	img, err := oci.Archive(ctx, file, m.GetArchive().GetTag(), tmp, limits)
	if err != nil {
		return nil, nil, blame(false, err)
	}
	undo = append(undo, img.Close)
	return img, done, nil
}

// importImage unpacks an image that is on this host's disk.
func (s *service) importImage(ctx context.Context, m *pb.ImportTemplateRequest_Start, t image.Template, img *oci.Image) (_ image.Template, sum string, err error) {
	if sum, err = img.Digest(); err != nil {
		return t, "", err
	}
	t, err = image.Import(ctx, s.cfg.Dir, img, s.envd, t, m.GetInert(), s.sandboxes.Room())
	return t, sum, blame(m.GetRegistry() != nil, err)
}

// blame turns an import's error into one that says who is at fault. Errors of unknown
// origin are the registry's or, without a registry, the image's.
func blame(registry bool, err error) error {
	var file *fs.PathError
	var exit *exec.ExitError
	var said *connect.Error
	switch err = sandbox.Full(err); {
	case err == nil, errors.Is(err, sandbox.ErrExhausted), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, oci.ErrRefused), errors.Is(err, oci.ErrDenied), errors.Is(err, oci.ErrNotFound),
		errors.As(err, &exit), errors.As(err, &said), errors.As(err, &file) && !errors.Is(err, fs.ErrNotExist):
		return err
	case registry:
		if _, ok := clienterr.Text(err); !ok {
			err = oci.NoRegistry(err)
		}
		return connect.NewError(connect.CodeUnavailable, err)
	}
	return oci.Refuse(err, "it is neither an OCI image layout nor what docker save writes")
}

// counted counts the bytes read from a reader.
type counted struct {
	io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += int64(n)
	return n, err
}

// ratio reads decompressed bytes, and fails if there are too many for the compressed
// bytes received so far.
type ratio struct {
	counted
	packed *counted
}

func (r *ratio) Read(p []byte) (int, error) {
	n, err := r.counted.Read(p)
	if r.n > oci.Unpackable(r.packed.n) {
		return 0, invalid("archive: decompresses to too many bytes for its size")
	}
	return n, err
}

// keep decompresses an archive to a file. It fails if the result has more than most
// bytes, or more than held can reserve. It returns the number of bytes received.
func keep(file string, archive io.Reader, most int64, disk *room.Room, held *spool) (packed int64, err error) {
	received := &counted{Reader: archive}
	in := bufio.NewReader(received)
	r := io.Reader(in)
	if magic, err := in.Peek(2); err == nil && magic[0] == 0x1f && magic[1] == 0x8b { // RFC 1952
		z, err := gzip.NewReader(in)
		if err != nil {
			return 0, connect.NewError(connect.CodeInvalidArgument, clienterr.Because(err, "archive: cannot be read"))
		}
		defer z.Close()
		r = &ratio{counted{Reader: z}, received}
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(held.writer(disk.Writer(f)), io.LimitReader(r, most+1))
	if errors.Is(err, gzip.ErrHeader) || errors.Is(err, gzip.ErrChecksum) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = connect.NewError(connect.CodeInvalidArgument, clienterr.Because(err, "archive: cannot be read"))
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return 0, fmt.Errorf("receive archive: %w", err)
	}
	if n > most {
		return 0, invalid("archive: must have at most %d bytes, twice the size of the disk", most)
	}
	return received.n, nil
}

// chunks reads the archive that a stream carries.
type chunks struct {
	stream *connect.ClientStream[pb.ImportTemplateRequest]
	rest   []byte
}

func (c *chunks) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		if !c.stream.Receive() {
			if err := c.stream.Err(); err != nil {
				return 0, err
			}
			return 0, io.EOF
		}
		m, ok := c.stream.Msg().GetMessage().(*pb.ImportTemplateRequest_Chunk)
		if !ok {
			return 0, invalid("every message after the first must be a chunk")
		}
		c.rest = m.Chunk
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}
