package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/room"
)

// Fetch downloads the image's layers to dir, so that [Image.Unpack] does not wait for the
// registry. If they exceed limits.Bytes together, it fails before it requests any.
func (i *Image) Fetch(ctx context.Context, dir string, limits Limits) error {
	if err := i.Fits(limits); err != nil {
		return err
	}
	layers, err := i.img.Layers()
	if err != nil {
		return err
	}
	here := make([]v1.Layer, len(layers))
	for n, l := range layers {
		file := filepath.Join(dir, "layer-"+strconv.Itoa(n))
		if err := fetch(ctx, l, file, limits.Room); err != nil {
			return fmt.Errorf("fetch layer %d: %w", n, err)
		}
		if here[n], err = partial.CompressedToLayer(fetchedLayer{l, file}); err != nil {
			return fmt.Errorf("layer %d: %w", n, err)
		}
	}
	i.img = fetchedImage{i.img, here}
	return nil
}

// fetch downloads a layer to a file. The library checks its digest and size.
func fetch(ctx context.Context, l v1.Layer, file string, disk *room.Room) error {
	r, err := l.Compressed()
	if err != nil {
		return answered(err)
	}
	defer r.Close()
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(disk.Writer(f), contextReader{ctx, r})
	return errors.Join(err, f.Close())
}

// fetchedImage is an image whose layers are on disk.
type fetchedImage struct {
	v1.Image
	layers []v1.Layer
}

// Layers implements [v1.Image].
func (f fetchedImage) Layers() ([]v1.Layer, error) { return f.layers, nil }

// fetchedLayer is a layer whose bytes are in a file.
type fetchedLayer struct {
	partial.CompressedLayer
	file string
}

// Compressed implements [partial.CompressedLayer].
func (f fetchedLayer) Compressed() (io.ReadCloser, error) { return os.Open(f.file) }

// ErrSlow means that the registry sends too slowly.
var ErrSlow = clienterr.New("the registry sends too slowly")

// pace is the minimum speed of a registry. A reader waits for grace in total, and a second
// more for every rate bytes that it received.
type pace struct {
	grace time.Duration
	rate  int64
}

var defaultPace = pace{grace: time.Minute, rate: 64 << 10}

// bound returns resp with a body that fails with [ErrSlow] below that speed. The body then
// calls cancel, which must cancel the request's context.
func (p pace) bound(resp *http.Response, cancel context.CancelCauseFunc) *http.Response {
	resp.Body = &paced{ReadCloser: resp.Body, pace: p, cancel: cancel}
	return resp
}

type paced struct {
	io.ReadCloser
	pace
	cancel context.CancelCauseFunc
	read   int64
	waited time.Duration
	slow   bool
}

// Read implements [io.Reader].
func (p *paced) Read(b []byte) (int, error) {
	left := p.grace + time.Duration(p.read/p.rate)*time.Second - p.waited
	if p.slow = p.slow || left <= 0; p.slow {
		return 0, ErrSlow
	}
	late := time.AfterFunc(left, func() { p.cancel(ErrSlow) })
	begun := time.Now()
	n, err := p.ReadCloser.Read(b)
	p.waited += time.Since(begun)
	p.read += int64(n)
	if !late.Stop() {
		p.slow = true
		if n == 0 {
			err = ErrSlow
		}
	}
	return n, err
}

// Close implements [io.Closer].
func (p *paced) Close() error {
	defer p.cancel(nil)
	return p.ReadCloser.Close()
}
