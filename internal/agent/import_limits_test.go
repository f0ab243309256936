package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/image/oci"
	"github.com/wrenn-dev/wrenn/internal/agent/image/oci/ocitest"
	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// TestImportsAreShared checks that another owner's import runs although one owner asks
// for more imports than there are places.
func TestImportsAreShared(t *testing.T) {
	var i imports
	const hog, other = "hog", "other"
	if err := i.take(t.Context(), hog); err != nil {
		t.Fatal(err)
	}
	second := make(chan error, 1)
	go func() { second <- i.take(t.Context(), hog) }()
	if err := i.take(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	// The owner's share, and then all places, are taken.
	gone, cancel := context.WithCancelCause(t.Context())
	why := errors.New("gone")
	cancel(why)
	for _, payer := range []string{hog, "somebody"} {
		if err := i.take(gone, payer); !errors.Is(err, why) {
			t.Errorf("one more got in: %v", err)
		}
	}
	i.give(other)
	select {
	case <-second:
		t.Error("one owner has all places")
	default:
	}
	if err := i.take(gone, hog); !errors.Is(err, why) {
		t.Errorf("the owner has the last place: %v", err)
	}
	i.give(hog)
	if err := await.Recv(t, "the second import of the owner", second); err != nil {
		t.Fatal(err)
	}
	i.give(hog)
	if len(i.taken) != 0 {
		t.Errorf("taken %v", i.taken)
	}
}

// TestImportSpool checks that space for an import is reserved before it is written, and
// bounded per owner and in total.
func TestImportSpool(t *testing.T) {
	var i imports
	of := func(payer string) *spool { return &spool{imports: &i, payer: payer, room: 8 * spoolShare * payerShare} }
	of("first").free() // free with nothing reserved
	one := of("one")
	if err := one.reserve(8); err != nil {
		t.Fatal(err)
	}
	if of("one").reserve(1) == nil || one.reserve(1) == nil {
		t.Error("an owner has more than its share")
	}
	for n := range payerShare - 1 {
		if err := of(fmt.Sprint(n)).reserve(8); err != nil {
			t.Error(err)
		}
	}
	if of("last").reserve(1) == nil {
		t.Error("all have more than there is")
	}
	one.free()
	if err := of("last").reserve(8); err != nil {
		t.Error(err)
	}
}

// TestArchiveSpool checks that archives, and the layouts extracted from them, take no
// more than their owner's share of a host's disk.
func TestArchiveSpool(t *testing.T) {
	content := make([]byte, 256<<10)
	rand.Read(content)
	packed, err := io.ReadAll(archived(t, ocitest.Build(t, ocitest.Archive(t, []ocitest.Entry{ocitest.File("a", string(content))})), t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	size := int64(len(packed))
	dir := layout.Dir(t.TempDir())
	s := &service{&Agent{cfg: Config{Dir: dir}, sandboxes: &sandbox.Manager{}}}
	const share = math.MaxInt64 / spoolShare / payerShare // of a disk without a bound
	fetch := func(payer string) (func() error, error) {
		_, discard, err := s.fetchImage(t.Context(), &pb.ImportTemplateRequest_Start{
			Source: &pb.ImportTemplateRequest_Start_Archive{Archive: &pb.ImportTemplateRequest_Archive{}},
		}, image.Template{ID: uuid.New(), Team: uuid.New(), Name: "archive", DiskMiB: 64}, payer, bytes.NewReader(packed))
		return discard, err
	}
	refused := func(what string, left int64) {
		t.Helper()
		s.imports.spooled = map[string]int64{"hog": share - left}
		if _, err := fetch("hog"); connect.CodeOf(err) != connect.CodeResourceExhausted {
			t.Errorf("%s: %v", what, err)
		}
		if got := s.imports.spooled["hog"]; got != share-left {
			t.Errorf("%s: %d bytes are reserved afterwards, want %d", what, got, share-left)
		}
		isEmpty(t, dir)
	}
	refused("the archive exceeds the share", size-1)
	refused("the archive fits, its layout does not", size+size/2)

	discard, err := fetch("other")
	if err != nil {
		t.Fatal("another owner: ", err)
	}
	if got := s.imports.spooled["other"]; got < size || got > 2*size {
		t.Errorf("an archive of %d bytes reserves %d", size, got)
	}
	if err := discard(); err != nil {
		t.Error(err)
	}
	if got, ok := s.imports.spooled["other"]; ok {
		t.Errorf("%d bytes are still reserved", got)
	}
	isEmpty(t, dir)
}

// isEmpty checks that there is no file below dir.
func isEmpty(t *testing.T, dir layout.Dir) {
	t.Helper()
	err := filepath.WalkDir(string(dir), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			t.Errorf("%s is left", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestImportTooLarge checks that an image which can never fit is refused for good, even
// when no import would fit now, because waiting would not help.
func TestImportTooLarge(t *testing.T) {
	web := httptest.NewServer(registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug))))
	defer web.Close()
	content := make([]byte, 3<<20)
	rand.Read(content)
	reference := strings.TrimPrefix(web.URL, "http://") + "/large:1"
	ref, err := name.ParseReference(reference)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, ocitest.Build(t, ocitest.Archive(t, []ocitest.Entry{ocitest.File("a", string(content))}))); err != nil {
		t.Fatal(err)
	}
	s := &service{&Agent{cfg: Config{Dir: layout.Dir(t.TempDir()), LocalRegistries: true}, sandboxes: &sandbox.Manager{}}}
	s.imports.spooled = map[string]int64{"others": 1 << 62}
	_, _, err = s.importTemplate(t.Context(), func(error) {}, &pb.ImportTemplateRequest_Start{
		Source: &pb.ImportTemplateRequest_Start_Registry{Registry: &pb.ImportTemplateRequest_Registry{Reference: reference}},
	}, image.Template{ID: uuid.New(), Team: uuid.New(), Name: "large", DiskMiB: 1}, nil)
	if !errors.Is(err, oci.ErrRefused) {
		t.Errorf("%v", err)
	}
}

// TestTrickleHoldsNoPlace imports an image whose registry stalls in the middle of a
// layer: the import blocks no place, and leaves nothing behind.
func TestTrickleHoldsNoPlace(t *testing.T) {
	begun, end := make(chan struct{}), make(chan struct{})
	real := registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)))
	var layer string
	var size int64
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || layer == "" || !strings.HasSuffix(r.URL.Path, layer) {
			real.ServeHTTP(w, r)
			return
		}
		// If the length differed from the manifest's, the import would fail at once.
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		w.WriteHeader(http.StatusOK)
		_, _ = w.Write([]byte("x"))
		_ = http.NewResponseController(w).Flush()
		close(begun)
		select {
		case <-end:
		case <-r.Context().Done():
		}
	}))
	defer web.Close()
	defer close(end)
	img := ocitest.Build(t, ocitest.Archive(t, []ocitest.Entry{ocitest.File("a", "b")}))
	reference := strings.TrimPrefix(web.URL, "http://") + "/slow:1"
	ref, err := name.ParseReference(reference)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	if size, err = layers[0].Size(); err != nil {
		t.Fatal(err)
	}
	layer = digest.String()

	dir := layout.Dir(t.TempDir())
	s := &service{&Agent{cfg: Config{Dir: dir, LocalRegistries: true}, sandboxes: &sandbox.Manager{}}}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("given up")
	done := make(chan error, 1)
	go func() {
		_, _, err := s.importTemplate(ctx, func(error) {}, &pb.ImportTemplateRequest_Start{
			Source: &pb.ImportTemplateRequest_Start_Registry{Registry: &pb.ImportTemplateRequest_Registry{Reference: reference}},
		}, image.Template{ID: uuid.New(), Team: uuid.New(), Name: "slow", DiskMiB: 64}, nil)
		done <- err
	}()
	await.Recv(t, "the registry is asked for the layer", begun)
	s.imports.mu.Lock()
	taken, spooled := len(s.imports.taken), len(s.imports.spooled)
	s.imports.mu.Unlock()
	if taken != 0 || spooled != 1 {
		t.Errorf("while the registry sends, %d have places and %d have reserved space", taken, spooled)
	}
	cancel(why)
	if err := await.Recv(t, "the import ends", done); !errors.Is(err, why) && !errors.Is(err, context.Canceled) {
		t.Errorf("the import ended with %v", err)
	}
	if len(s.imports.running)+len(s.imports.taken)+len(s.imports.spooled) != 0 {
		t.Errorf("running %v, taken %v, spooled %v", s.imports.running, s.imports.taken, s.imports.spooled)
	}
	isEmpty(t, dir)
}
