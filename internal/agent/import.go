package agent

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/image/oci"
	"github.com/wrenn-dev/wrenn/internal/agent/room"
	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	"github.com/wrenn-dev/wrenn/internal/agent/told"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
)

const (
	// maxImports is how many images are unpacked at once; more wait. A team has
	// all but one of these places at most.
	maxImports = 2
	// maxReference bounds a reference, a tag, a user's name and a password.
	maxReference = 4096
)

// imports are the images that are being made into templates.
type imports struct {
	mu      sync.Mutex
	running map[uuid.UUID]*importing
	// taken counts the places by their teams; freed is closed when one is given back.
	taken map[uuid.UUID]int
	freed chan struct{}
}

// importing is one of them.
type importing struct {
	off  func(why error) // breaks it off
	done chan struct{}   // closed at its end
}

// errRemoved ends the import of a template that is removed.
var errRemoved = connect.NewError(connect.CodeAborted, told.New("the template was removed while it was made"))

// end breaks off whoever makes the template, and waits until nothing of that
// is under way.
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

// enter waits until nobody else makes the template, and few others are made.
// off is what breaks the caller off.
func (i *imports) enter(ctx context.Context, off func(error), team, template uuid.UUID) (leave func(), err error) {
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
		i.running, i.taken, i.freed = map[uuid.UUID]*importing{}, map[uuid.UUID]int{}, make(chan struct{})
	}
	done := make(chan struct{})
	i.running[template] = &importing{off, done}
	i.mu.Unlock()
	end := func() {
		i.mu.Lock()
		delete(i.running, template)
		i.mu.Unlock()
		close(done)
	}
	if err := i.take(ctx, team); err != nil {
		end()
		return nil, err
	}
	return func() { i.give(team); end() }, nil
}

// take waits for a place that the team may have.
func (i *imports) take(ctx context.Context, team uuid.UUID) error {
	for {
		i.mu.Lock()
		all := 0
		for _, n := range i.taken {
			all += n
		}
		if all < maxImports && i.taken[team] < maxImports-1 {
			i.taken[team]++
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

// give gives a team's place back.
func (i *imports) give(team uuid.UUID) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.taken[team]--; i.taken[team] == 0 {
		delete(i.taken, team)
	}
	close(i.freed)
	i.freed = make(chan struct{})
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
	// It is undone when the agent stops, too.
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

// importedTemplate checks what is asked for.
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
		return t, invalid("template_id: the built-in template is not to be replaced")
	case t.Name == "" || len(t.Name) > maxName:
		return t, invalid("name: must have 1 to %d bytes", maxName)
	case t.DiskMiB < 1 || t.DiskMiB > sandbox.MaxDiskMiB:
		return t, invalid("disk_mib: must be between 1 and %d", sandbox.MaxDiskMiB)
	case m.GetSource() == nil:
		return t, invalid("source: a registry or an archive is needed")
	case len(m.GetArchive().GetTag()) > maxReference:
		return t, invalid("tag: must have %d bytes at most", maxReference)
	case (m.GetVcpus() == 0) != (m.GetMemoryMib() == 0):
		return t, invalid("vcpus and memory_mib: go together")
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
		return invalid("username: a password needs one")
	}
	return nil
}

// access is with what a registry is asked.
func (s *service) access(r *pb.ImportTemplateRequest_Registry) oci.Access {
	return oci.Access{Username: r.GetUsername(), Password: r.GetPassword(), Loopback: s.cfg.LocalRegistries, Private: s.cfg.PrivateRegistries}
}

// resolveTimeout bounds how long a registry is asked what a reference means.
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

// importTemplate makes the template, and captures it. After an error nothing
// of it is there.
func (s *service) importTemplate(ctx context.Context, off func(error), m *pb.ImportTemplateRequest_Start, t image.Template, archive io.Reader) (_ image.Template, sum string, err error) {
	leave, err := s.imports.enter(ctx, off, t.Team, t.ID)
	if err != nil {
		return t, "", err
	}
	defer leave()
	made, err := image.Find(s.cfg.Dir, t.Team, t.ID)
	if errors.Is(err, fs.ErrNotExist) {
		made, sum, err = s.importImage(ctx, m, t, archive)
	}
	if err != nil {
		return t, "", err
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

// importImage finds the image and unpacks it.
func (s *service) importImage(ctx context.Context, m *pb.ImportTemplateRequest_Start, t image.Template, archive io.Reader) (_ image.Template, sum string, err error) {
	tmp, err := image.TempTemplate(s.cfg.Dir)
	if err != nil {
		return t, "", sandbox.Full(err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	// Layers may be compressed or not, and upper ones replace what lower ones have.
	limits := oci.Limits{Bytes: 2 * int64(t.DiskMiB) << 20, Room: s.sandboxes.Room()}
	var img *oci.Image
	if r := m.GetRegistry(); r != nil {
		img, err = oci.Registry(ctx, r.GetReference(), s.access(r))
	} else {
		file := filepath.Join(tmp, "archive.tar")
		if limits.Packed, err = keep(file, archive, limits.Bytes, limits.Room); err != nil {
			return t, "", sandbox.Full(err)
		}
		limits.Bytes = min(limits.Bytes, oci.Unpackable(limits.Packed))
		img, err = oci.Archive(ctx, file, m.GetArchive().GetTag(), tmp, limits)
	}
	if err != nil {
		return t, "", blame(m.GetRegistry() != nil, err)
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	if sum, err = img.Digest(); err != nil {
		return t, "", err
	}
	t, err = image.Import(ctx, s.cfg.Dir, img, s.envd, t, m.GetInert(), limits.Room)
	return t, sum, blame(m.GetRegistry() != nil, err)
}

// blame says whose fault it is that an image is not imported: the image's or
// the registry's, unless it is known to be another's.
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
		return connect.NewError(connect.CodeUnavailable, unanswered(err))
	}
	return oci.Refuse(err, "it is neither an OCI image layout nor what docker save writes")
}

// unanswered is the error of a registry that did not do what registries do.
func unanswered(err error) error {
	if _, ok := told.Text(err); ok {
		return err
	}
	var dns *net.DNSError
	if errors.As(err, &dns) && dns.IsNotFound {
		return told.Because(err, "the registry's name has no address")
	}
	return told.Because(err, "the registry does not answer as a registry does")
}

// counted counts the bytes that are read.
type counted struct {
	io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += int64(n)
	return n, err
}

// ratio reads what an input unpacks to, until that is too much for what has
// come of the input.
type ratio struct {
	counted
	packed *counted
}

func (r *ratio) Read(p []byte) (int, error) {
	n, err := r.counted.Read(p)
	if r.n > oci.Unpackable(r.packed.n) {
		return 0, invalid("archive: unpacks to too many bytes for its size")
	}
	return n, err
}

// keep writes an archive, which may be compressed, to a file as it is without
// that: so many bytes at most. It returns how many bytes the archive had.
func keep(file string, archive io.Reader, most int64, disk *room.Room) (packed int64, err error) {
	received := &counted{Reader: archive}
	in := bufio.NewReader(received)
	r := io.Reader(in)
	if magic, err := in.Peek(2); err == nil && magic[0] == 0x1f && magic[1] == 0x8b { // RFC 1952
		z, err := gzip.NewReader(in)
		if err != nil {
			return 0, connect.NewError(connect.CodeInvalidArgument, told.Because(err, "archive: cannot be read"))
		}
		defer z.Close()
		r = &ratio{counted{Reader: z}, received}
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(roomy{f, disk}, io.LimitReader(r, most+1))
	if errors.Is(err, gzip.ErrHeader) || errors.Is(err, gzip.ErrChecksum) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = connect.NewError(connect.CodeInvalidArgument, told.Because(err, "archive: cannot be read"))
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return 0, fmt.Errorf("receive archive: %w", err)
	}
	if n > most {
		return 0, invalid("archive: has more than %d bytes, twice the disk's size", most)
	}
	return received.n, nil
}

// roomy writes to a file what there is room for.
type roomy struct {
	file *os.File
	room *room.Room
}

func (w roomy) Write(p []byte) (n int, err error) {
	err = w.room.During(int64(len(p)), func() error {
		n, err = w.file.Write(p)
		return err
	})
	return n, err
}

// chunks reads a stream's archive.
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
