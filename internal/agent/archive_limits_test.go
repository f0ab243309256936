package agent

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/wrenn-dev/wrenn/internal/agent/image/oci"
	"github.com/wrenn-dev/wrenn/internal/agent/image/oci/ocitest"
	"github.com/wrenn-dev/wrenn/internal/room"
)

// zipped compresses as far as gzip can.
func zipped(t *testing.T, from io.Reader) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(z, from); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// archived writes an image as a layout in a folder, and returns that as an archive.
func archived(t *testing.T, img v1.Image, layoutDir string) io.Reader {
	t.Helper()
	p, err := layout.Write(layoutDir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	w := tar.NewWriter(&packed)
	if err := errors.Join(w.AddFS(os.DirFS(layoutDir)), w.Close()); err != nil {
		t.Fatal(err)
	}
	return &packed
}

// noShare returns a spool without a bound.
func noShare() *spool { return &spool{imports: &imports{}, room: math.MaxInt64} }

// unpacked is the size of what the tests' archives unpack to: about twice what such small
// ones may, and no more, because gzip is slow with the race detector.
const unpacked = 128 << 20

// TestGzipInGzip checks that an archive of a few kilobytes, compressed twice, does not
// become hundreds of megabytes on the host's disk.
func TestGzipInGzip(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to unpack an image")
	}
	layer := zipped(t, bytes.NewReader(ocitest.Archive(t, []ocitest.Entry{ocitest.File("zeros", string(make([]byte, unpacked)))})))
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(ocitest.Build(t), l)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	upload := zipped(t, archived(t, img, filepath.Join(dir, "layout")))
	if len(upload) > 8192 {
		t.Fatalf("the upload of %d bytes is too large for this test", len(upload))
	}
	// The disk limit would allow it.
	limits := oci.Limits{Bytes: 2 << 40}
	file := filepath.Join(dir, "archive.tar")
	if limits.Packed, err = keep(file, bytes.NewReader(upload), limits.Bytes, nil, noShare()); err != nil || limits.Packed != int64(len(upload)) {
		t.Fatalf("the outer archive unpacked to a small one: %d bytes were received, %v", limits.Packed, err)
	}
	found, err := oci.Archive(t.Context(), file, "", dir, limits)
	if err != nil {
		t.Fatal(err)
	}
	defer found.Close()
	if err := found.Unpack(t.Context(), filepath.Join(dir, "tree"), limits); err == nil || !strings.Contains(err.Error(), "too many bytes") {
		t.Errorf("%d bytes unpack to %d: %v", len(upload), unpacked, err)
	}
}

// TestArchiveRatio checks that an import keeps no archive that unpacks to far more than
// was sent.
func TestArchiveRatio(t *testing.T) {
	upload := zipped(t, io.LimitReader(zeros{}, unpacked))
	file := filepath.Join(t.TempDir(), "archive.tar")
	_, err := keep(file, bytes.NewReader(upload), 2<<40, nil, noShare())
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("%d bytes unpack to %d: %v", len(upload), unpacked, err)
	}
	if info, err := os.Stat(file); err != nil || info.Size() > oci.Unpackable(int64(len(upload))) {
		t.Errorf("it has left a file of %d bytes, %v", info.Size(), err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// TestImportHoldsRoom checks that an import writes nothing without room for it, and
// releases its reservation.
func TestImportHoldsRoom(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to unpack an image")
	}
	free := int64(1 << 20)
	disk := room.New(1<<20-1<<10, func() (int64, error) { return free, nil })
	dir := t.TempDir()
	var full *room.FullError
	if _, err := keep(filepath.Join(dir, "a"), io.LimitReader(rand.Reader, 64<<10), 1<<30, disk, noShare()); !errors.As(err, &full) {
		t.Errorf("an archive that there is no room for: %v", err)
	}
	img := ocitest.Build(t, ocitest.Archive(t, []ocitest.Entry{ocitest.File("x", strings.Repeat("x", 64<<10))}))
	file := filepath.Join(dir, "archive.tar")
	if _, err := keep(file, archived(t, img, filepath.Join(dir, "layout")), 1<<30, nil, noShare()); err != nil {
		t.Fatal(err)
	}
	found, err := oci.Archive(t.Context(), file, "", dir, oci.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer found.Close()
	if err := found.Unpack(t.Context(), filepath.Join(dir, "tree"), oci.Limits{Room: disk}); !errors.As(err, &full) {
		t.Errorf("a file that there is no room for: %v", err)
	}
	free = 2 << 20
	if err := found.Unpack(t.Context(), filepath.Join(dir, "tree"), oci.Limits{Room: disk}); err != nil {
		t.Error(err)
	}
	if left, err := disk.Left(); left != 1<<20+1<<10 || err != nil {
		t.Errorf("%d bytes are still reserved afterwards, %v", left, err)
	}
}
