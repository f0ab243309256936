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
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/scheduler"
	"github.com/wrenn-dev/wrenn/internal/server/spool"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

const (
	// importTimeout bounds the import of an image, the upload of an archive too.
	importTimeout = time.Hour
	// maxImports is how many images all teams of one owner may import at once through
	// one server.
	maxImports = 4
	// importChunk is how much of an archive is in one message, in bytes.
	importChunk = 256 << 10
)

// Image is an OCI image to make a template of.
type Image struct {
	// Name is the template's. It becomes the latest version of that name.
	Name string
	// Reference is where a registry has it, with or without credentials, which
	// are passed on and written down nowhere.
	Reference, Username, Password string
	// Archive, if there is no Reference, is what `docker save` writes or a tar of
	// an OCI image layout, and Tag the image's name in it.
	Archive *spool.Body
	Tag     string
	DiskMiB int32 // 0: the host's default
	// Inert keeps the image's entry point from being started.
	Inert bool

	// What is made for a build has no name but a key, by which it is found again.
	build *uuid.UUID
	key   []byte
}

// resolveTimeout bounds how long a host asks a registry what a reference means.
const resolveTimeout = 90 * time.Second

// ImportLayer makes what a build begins with of the image that a registry has
// under a reference at this moment, or finds what a build of the team made of
// the same image. When ctx ends before it does, nothing of it goes on.
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
	// What is imported is what the registry said, whatever it says by then.
	i.Reference = is.Msg.GetPinned()
	key := sha256.Sum256([]byte("oci image " + i.Reference))
	i.key = key[:]
	row, err = s.Store.UseImported(ctx, db.UseImportedParams{TeamID: team, LayerKey: i.key})
	if err == nil || !errors.Is(err, store.ErrNoRows) {
		return row, err
	}
	return s.Import(ctx, team, i)
}

// importPlaces are the hosts that can import an image, the best first. Every
// host has the built-in template.
func (s *Service) importPlaces(ctx context.Context) ([]*hosts.Host, error) {
	return s.Hosts.Places(ctx, uuid.Nil, scheduler.Request{MemoryMiB: sandboxes.DefaultMemoryMiB, VCPUs: sandboxes.DefaultVCPUs, DiskMiB: sandboxes.DefaultMemoryMiB})
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
		return fault.New(fault.InvalidArgument, "username: a password needs one")
	}
	return nil
}

// Import makes a template of an image for a team and returns when it can be
// started from. Once the image's archive, if there is one, has arrived, it
// goes on when ctx ends before, unless it is for a build.
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
		// Nothing is held while it arrives: neither a name nor a place on a host.
		if archive, err = s.Spool.Receive(payer, *i.Archive, math.MaxInt64); err != nil {
			return row, tooLong(err)
		}
		// That can take hours: hosts may have gone, or drain.
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
			<-done // Whoever ended it removes what is left.
		}
		return row, ctx.Err()
	}
}

// tooLong is what the client is told of an archive that does not fit.
func tooLong(err error) error {
	var long *spool.TooLong
	if errors.As(err, &long) {
		return fault.Because(err, fault.PayloadTooLarge, "the archive has more than %d MiB", long.Most>>20)
	}
	return err
}

func closeFile(f *spool.File) error {
	if f == nil {
		return nil
	}
	return f.Close()
}

// importTo claims the template's name and has a host make it.
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
		return claimed, fault.New(fault.Conflict, "another template %q is being made", i.Name)
	}
	if err != nil {
		return claimed, fmt.Errorf("write template: %w", err)
	}
	begun := time.Now()
	answer, err := s.send(ctx, host, claimed, payer, i, archive)
	if err != nil {
		log.Warn("import image", "error", err)
		// Where it is not certain that the host is done with it, whoever watches
		// the host looks.
		done := hosts.Definite(err) && ctx.Err() == nil
		var f *fault.Error
		if !errors.As(err, &f) {
			err = hosts.Fault(err)
		}
		if errors.As(err, &f) && s.Work.Context().Err() == nil {
			if err := s.importFails(s.Work.Context(), claimed, f.Message, store.Now(), done); err != nil {
				log.Error("write that the import failed", "error", err)
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

// importFails writes why there is no template, unless something was written of
// that after since, and where the host is done with it that its name is free.
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

// imported writes that a template is there, which its name means from now on.
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

// send gives a host an image to import.
func (s *Service) send(ctx context.Context, host *hosts.Host, row db.Template, payer uuid.UUID, i Image, archive *spool.File) (*hostagentv1.ImportTemplateResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	start := &hostagentv1.ImportTemplateRequest_Start{
		TemplateId: id.Format(id.Template, row.ID), TeamId: id.Format(id.Team, row.TeamID), Name: row.Name,
		DiskMib: i.DiskMiB, Vcpus: sandboxes.DefaultVCPUs, MemoryMib: sandboxes.DefaultMemoryMiB, Inert: i.Inert, Payer: payer.String(),
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
			cancel() // not closed: to the host that would be the archive's end
			return nil, fmt.Errorf("read spooled archive: %w", readErr)
		}
	}
	// An error of Send says only that the host has one; it is received here.
	res, err := stream.CloseAndReceive()
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// isImport says whether a template that is pending is made of an image.
func isImport(row db.Template) bool { return row.CapturedFrom == nil && row.BuildID == nil }
