package templates

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/scheduler"
	"github.com/wrenn-dev/wrenn/internal/server/spool"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

const (
	// importTimeout bounds an import, including the transfer of the archive to the host.
	importTimeout = time.Hour
	// maxImports is how many imports all teams of one owner may run at once on one
	// server.
	maxImports = 4
	// importChunk is the size of a message of archive data, in bytes.
	importChunk = 256 << 10
)

// Image is an OCI image to import as a template.
type Image struct {
	// Name is the template's name. The template becomes the latest version of it.
	Name string
	// Reference is the image's reference in a registry, with optional credentials, which
	// are passed on and never stored.
	Reference, Username, Password string
	// Archive, if there is no Reference, is the output of `docker save` or a tar of an
	// OCI image layout. Tag selects an image in it.
	Archive *spool.Body
	Tag     string
	DiskMiB int32 // 0: the host's default
	// Inert does not start the image's entry point.
	Inert bool

	// A build's import has no name. key identifies it for later builds.
	build *uuid.UUID
	key   []byte
}

// resolveTimeout bounds how long a host may take to resolve a reference.
const resolveTimeout = 90 * time.Second

// ImportLayer returns the template that a build starts from for an image in a registry.
// It resolves the reference now, and imports the image unless an earlier build of the
// team has. The end of ctx cancels the import.
func (s *Service) ImportLayer(ctx context.Context, team, build uuid.UUID, i Image) (db.Template, error) {
	i.Name, i.Inert, i.build = "image", true, &build
	var row db.Template
	if err := i.check(); err != nil {
		return row, err
	}
	places, err := s.importPlaces(ctx)
	if err != nil {
		return row, err
	}
	call, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	is, err := places[0].Agent.ResolveImage(call, connect.NewRequest(&hostagentv1.ResolveImageRequest{
		Registry: &hostagentv1.ImportTemplateRequest_Registry{Reference: i.Reference, Username: i.Username, Password: i.Password},
	}))
	if err != nil {
		return row, hosts.Fault(err)
	}
	// Import the resolved digest, even if the reference changes.
	i.Reference = is.Msg.GetPinned()
	key := sha256.Sum256([]byte("oci image " + i.Reference))
	i.key = key[:]
	row, err = s.Store.UseImported(ctx, db.UseImportedParams{TeamID: team, LayerKey: i.key})
	if err == nil || !errors.Is(err, store.ErrNoRows) {
		return row, err
	}
	return s.Import(ctx, team, i)
}

// importPlaces returns the hosts that can import an image, best first. Every host has the
// built-in template, so it stands for any.
func (s *Service) importPlaces(ctx context.Context) ([]*hosts.Host, error) {
	return s.Hosts.Places(ctx, uuid.Nil, scheduler.Request{MemoryMiB: hostwire.DefaultMemoryMiB, VCPUs: hostwire.DefaultVCPUs, DiskMiB: hostwire.DefaultMemoryMiB})
}

// The kinds of templates.
const (
	kindTemplate = "template"
	kindLayer    = "layer"
)

func (i Image) kind() string {
	if i.build != nil {
		return kindLayer
	}
	return kindTemplate
}

func (i Image) check() error {
	if err := CheckName(i.Name); err != nil {
		return err
	}
	if i.Username == "" && i.Password != "" {
		return fault.New(fault.InvalidArgument, "username: must be set with a password")
	}
	return nil
}

// Import imports an image as a template of a team and returns when sandboxes can start
// from it. After the archive has arrived, the end of ctx does not stop the import, unless
// it is for a build.
func (s *Service) Import(ctx context.Context, team uuid.UUID, i Image) (db.Template, error) {
	var row db.Template
	if err := i.check(); err != nil {
		return row, err
	}
	places, err := s.importPlaces(ctx)
	if err != nil {
		return row, err
	}
	payer, err := s.store.GetTeamPayer(ctx, team)
	if err != nil {
		return row, fmt.Errorf("look up the team's owner: %w", err)
	}
	var archive *spool.File
	if i.Archive != nil {
		// Claim neither a name nor a place on a host while the archive arrives.
		if archive, err = s.Spool.Receive(payer, *i.Archive, math.MaxInt64); err != nil {
			return row, tooLong(err)
		}
		// That can take hours, so the hosts may have changed.
		if places, err = s.importPlaces(ctx); err != nil {
			return row, errors.Join(err, closeFile(archive))
		}
	}
	template := uuid.New()
	end, err := s.beginImport(payer, template)
	if err != nil {
		return row, errors.Join(err, closeFile(archive))
	}
	type outcome struct {
		row db.Template
		err error
	}
	done := make(chan outcome, 1)
	run, cancel := context.WithTimeout(s.Work.For(ctx), importTimeout)
	if i.build != nil {
		stop := context.AfterFunc(ctx, cancel)
		defer stop()
	}
	go func() {
		defer cancel()
		defer end()
		var o outcome
		o.err = s.Work.Guard(func() (err error) {
			o.row, err = s.importTo(run, places[0], team, payer, template, i, archive)
			return err
		})
		if err := closeFile(archive); err != nil {
			s.Log.Error("remove spooled archive", "error", err)
		}
		done <- o
	}()
	select {
	case o := <-done:
		return o.row, o.err
	case <-ctx.Done():
		if i.build != nil {
			<-done // The build cleans up.
		}
		return row, ctx.Err()
	}
}

// tooLong converts the error of an archive that is too long.
func tooLong(err error) error {
	var long *spool.TooLong
	if errors.As(err, &long) {
		return fault.Because(err, fault.PayloadTooLarge, "the archive is larger than %d MiB", long.Most>>20)
	}
	return err
}

func closeFile(f *spool.File) error {
	if f == nil {
		return nil
	}
	return f.Close()
}

// importTo claims the template's name and makes a host import the image.
func (s *Service) importTo(ctx context.Context, host *hosts.Host, team, payer, template uuid.UUID, i Image, archive *spool.File) (db.Template, error) {
	log := s.Log.With("template_id", id.Format(id.Template, template), "name", i.Name)
	var claimed db.Template
	err := s.Store.InTx(ctx, func(q *db.Queries) error {
		var err error
		claimed, err = q.ClaimImport(ctx, db.ClaimImportParams{
			ID: template, TeamID: team, Name: i.Name, Kind: i.kind(), CreatedAt: store.Now(), DiskMiB: i.DiskMiB, Worker: &s.Store.Server, BuildID: i.build, LayerKey: i.key,
		})
		if err != nil {
			return err
		}
		return q.AddHostTemplate(ctx, db.AddHostTemplateParams{HostID: host.ID, TemplateID: template})
	})
	if errors.Is(err, store.ErrNoRows) {
		return claimed, fault.New(fault.Conflict, "another template %q is being created", i.Name)
	}
	if err != nil {
		return claimed, fmt.Errorf("insert template: %w", err)
	}
	begun := time.Now()
	answer, err := s.send(ctx, host, claimed, payer, i, archive)
	if err != nil {
		log.Warn("import image", "error", err)
		// If the host may still work on it, the reconciler checks later.
		done := hosts.Definite(err) && ctx.Err() == nil
		var f *fault.Error
		if !errors.As(err, &f) {
			err = hosts.Fault(err)
		}
		if errors.As(err, &f) && s.Work.Context().Err() == nil {
			if err := s.importFails(s.Work.Context(), claimed, f.Message, store.Now(), done); err != nil {
				log.Error("store failure of import", "error", err)
			}
		}
		return claimed, err
	}
	var ready db.Template
	err = work.Persist(s.Work.Context(), func(ctx context.Context) error {
		var err error
		ready, err = s.imported(ctx, host.ID, claimed, answer.GetTemplate())
		return err
	})
	if err != nil {
		return claimed, fmt.Errorf("mark template ready: %w", err)
	}
	log.Info("image imported", "digest", answer.GetDigest(), "version", ready.Version, "took", time.Since(begun))
	return ready, nil
}

// importFails stores why an import failed, unless a later failure has been stored since.
// If done, the host has ended the import, and importFails also frees the name.
func (s *Service) importFails(ctx context.Context, row db.Template, why string, since time.Time, done bool) error {
	return work.Persist(ctx, func(ctx context.Context) error {
		return s.Store.InTx(ctx, func(q *db.Queries) error {
			if err := q.LockLimit(ctx, db.LockLimitParams{What: "failed imports", TeamID: row.TeamID}); err != nil {
				return err
			}
			if err := q.NoteFailedImport(ctx, db.NoteFailedImportParams{ID: row.ID, Error: why, Since: since}); err != nil || !done {
				return err
			}
			return q.DropTemplate(ctx, row.ID)
		})
	})
}

// imported marks a template ready and makes it the latest version of its name.
func (s *Service) imported(ctx context.Context, host uuid.UUID, claimed db.Template, t *hostagentv1.Template) (row db.Template, err error) {
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		if row, err = q.TemplateReady(ctx, Measured(host, claimed, t)); err != nil || row.Kind != kindTemplate {
			return err
		}
		if err := q.ForgetFailedImport(ctx, db.ForgetFailedImportParams{TeamID: row.TeamID, Name: row.Name}); err != nil {
			return err
		}
		_, err := q.SetTag(ctx, db.SetTagParams{ID: claimed.ID, Tag: Latest})
		return err
	})
	return row, err
}

// send makes a host import an image and waits for the result.
func (s *Service) send(ctx context.Context, host *hosts.Host, row db.Template, payer uuid.UUID, i Image, archive *spool.File) (*hostagentv1.ImportTemplateResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	start := &hostagentv1.ImportTemplateRequest_Start{
		TemplateId: id.Format(id.Template, row.ID), TeamId: id.Format(id.Team, row.TeamID), Name: row.Name,
		DiskMib: i.DiskMiB, Vcpus: hostwire.DefaultVCPUs, MemoryMib: hostwire.DefaultMemoryMiB, Inert: i.Inert, Payer: payer.String(),
	}
	if archive == nil {
		start.Source = &hostagentv1.ImportTemplateRequest_Start_Registry{Registry: &hostagentv1.ImportTemplateRequest_Registry{Reference: i.Reference, Username: i.Username, Password: i.Password}}
	} else {
		start.Source = &hostagentv1.ImportTemplateRequest_Start_Archive{Archive: &hostagentv1.ImportTemplateRequest_Archive{Tag: i.Tag}}
	}
	stream := host.Agent.ImportTemplate(ctx)
	err := stream.Send(&hostagentv1.ImportTemplateRequest{Message: &hostagentv1.ImportTemplateRequest_Start_{Start: start}})
	buf := make([]byte, importChunk)
	for err == nil && archive != nil {
		n, readErr := archive.Read(buf)
		if n > 0 {
			err = stream.Send(&hostagentv1.ImportTemplateRequest{Message: &hostagentv1.ImportTemplateRequest_Chunk{Chunk: buf[:n]}})
		}
		if errors.Is(readErr, io.EOF) {
			break
		}
		if readErr != nil {
			cancel() // Closing the stream would tell the host that the archive is complete.
			return nil, fmt.Errorf("read spooled archive: %w", readErr)
		}
	}
	// Send only reports that the host failed. CloseAndReceive returns the cause.
	res, err := stream.CloseAndReceive()
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// isImport reports whether a pending template is imported from an image.
func isImport(row db.Template) bool { return row.CapturedFrom == nil && row.BuildID == nil }
