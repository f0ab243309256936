// Package oci unpacks images of the Open Container Initiative (image-spec 1.1), and
// Docker's, to root file systems.
//
// Images are hostile: their author, or whoever runs the registry, may have chosen every
// byte. The package bounds what it reads and checks it against digests, and it writes only
// to the folder to which it unpacks.
package oci

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
)

// ErrRefused means that the image itself is invalid.
var ErrRefused = errors.New("image refused")

// Refuse returns an [ErrRefused] with a text for clients and a cause for the log, which
// may be nil.
func Refuse(cause error, format string, args ...any) error {
	cause = cmp.Or(cause, ErrRefused)
	if !errors.Is(cause, ErrRefused) {
		cause = fmt.Errorf("%w: %w", ErrRefused, cause)
	}
	return clienterr.Because(cause, "the image is refused: "+format, args...)
}

// The platform of guests.
const (
	platformOS   = "linux"
	platformArch = "amd64"
)

const (
	maxDocument = 8 << 20 // bytes of a manifest, index or configuration
	maxLayers   = 256
	maxBlobs    = 10_000 // files in an archive
)

// Config is an image's configuration of its processes.
type Config struct {
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Cmd        []string          `json:"cmd,omitempty"`
	Env        map[string]string `json:"env,omitempty"`
	User       string            `json:"user,omitempty"` // "user" or "user:group", names or numbers; empty: root
	WorkingDir string            `json:"working_dir,omitempty"`
}

// Image is an image for linux/amd64.
type Image struct {
	img    v1.Image
	file   *v1.ConfigFile
	config Config
	close  func() error
	// packed is the compressed size of the image, in bytes.
	packed int64
}

// Config returns the image's configuration.
func (i *Image) Config() Config { return i.config }

// Digest returns the digest of the image's configuration, "sha256:" and hexadecimal
// digits. Images with the same digest have the same content.
func (i *Image) Digest() (string, error) {
	h, err := i.img.ConfigName()
	return h.String(), err
}

// Packed returns the compressed size of the layers in bytes.
func (i *Image) Packed() int64 { return i.packed }

// Fits returns an error if the compressed layers exceed limits.Bytes.
func (i *Image) Fits(limits Limits) error {
	if i.packed > limits.orDefault().Bytes {
		return errTooLarge
	}
	return nil
}

// Close closes the image and removes its temporary files.
func (i *Image) Close() error { return i.close() }

// newImage checks an image's manifest and configuration. It calls close if it fails.
func newImage(img v1.Image, close func() error) (_ *Image, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, close())
		}
	}()
	m, err := img.Manifest()
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	if m.Config.Size < 0 || m.Config.Size > maxDocument {
		return nil, Refuse(nil, "its configuration has %d bytes, more than %d", m.Config.Size, maxDocument)
	}
	if len(m.Layers) > maxLayers {
		return nil, Refuse(nil, "it has %d layers, more than %d", len(m.Layers), maxLayers)
	}
	raw, err := img.RawConfigFile()
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	sum, _, err := v1.SHA256(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	if sum != m.Config.Digest {
		return nil, Refuse(nil, "its configuration has the digest %v instead of %v", sum, m.Config.Digest)
	}
	file, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return nil, Refuse(err, "its configuration cannot be read")
	}
	if file.OS != platformOS || file.Architecture != platformArch {
		return nil, Refuse(nil, "it is for %.40s/%.40s, not %s/%s", file.OS, file.Architecture, platformOS, platformArch)
	}
	if len(file.RootFS.DiffIDs) != len(m.Layers) {
		return nil, Refuse(nil, "it has %d layers, but digests of %d", len(m.Layers), len(file.RootFS.DiffIDs))
	}
	config, err := newConfig(file.Config)
	if err != nil {
		return nil, err
	}
	var packed int64
	for n, l := range m.Layers {
		// The library does not bound a layer with a negative size.
		if l.Size < 0 || l.Size > math.MaxInt64-packed {
			return nil, Refuse(nil, "its layer %d has %d bytes", n, l.Size)
		}
		packed += l.Size
	}
	return &Image{img, file, config, close, packed}, nil
}

func newConfig(c v1.Config) (Config, error) {
	config := Config{Entrypoint: c.Entrypoint, Cmd: c.Cmd, User: c.User, WorkingDir: c.WorkingDir, Env: map[string]string{}}
	for _, kv := range c.Env {
		if k, v, ok := strings.Cut(kv, "="); ok && k != "" {
			config.Env[k] = v // the last one of a name wins
		}
	}
	for _, s := range slices.Concat(c.Entrypoint, c.Cmd, c.Env, []string{c.User, c.WorkingDir}) {
		if strings.ContainsRune(s, 0) {
			return Config{}, Refuse(nil, "its configuration has a NUL character")
		}
	}
	return config, nil
}

// Layout opens an image in an OCI image layout, which is a folder. tag names the image. It
// may be empty if the layout has only one image.
func Layout(dir, tag string) (*Image, error) {
	img, err := openLayout(dir, tag, func() error { return nil })
	if err != nil {
		return nil, fmt.Errorf("image layout %s: %w", dir, err)
	}
	return img, nil
}

func openLayout(dir, tag string, close func() error) (*Image, error) {
	img, err := findImage(dir, tag)
	if err != nil {
		return nil, errors.Join(err, close())
	}
	return newImage(img, close)
}

func findImage(dir, tag string) (v1.Image, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if err := isDocument(root, "index.json"); err != nil {
		return nil, err
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	f := finder{root: root, found: map[v1.Hash]v1.Image{}}
	if err := f.index(index, tag, 0); err != nil {
		return nil, err
	}
	if len(f.found) != 1 {
		return nil, fmt.Errorf("it has %d images with the name %q for %s/%s instead of one", len(f.found), tag, platformOS, platformArch)
	}
	for _, img := range f.found {
		return img, nil
	}
	panic("unreachable")
}

// finder finds the images for the platform in an index and nested ones.
type finder struct {
	root  *os.Root
	found map[v1.Hash]v1.Image
}

// refName is image-spec's annotation with a tag.
const refName = "org.opencontainers.image.ref.name"

func (f *finder) index(index v1.ImageIndex, tag string, depth int) error {
	m, err := index.IndexManifest()
	if err != nil {
		return err
	}
	for _, d := range m.Manifests {
		if tag != "" && d.Annotations[refName] != tag {
			continue
		}
		if p := d.Platform; p != nil && (p.OS != platformOS || p.Architecture != platformArch) {
			continue
		}
		blob := path.Join("blobs", d.Digest.Algorithm, d.Digest.Hex)
		switch {
		case d.MediaType.IsImage():
			if err := isDocument(f.root, blob); err != nil {
				return err
			}
			img, err := index.Image(d.Digest)
			if err != nil {
				return err
			}
			raw, err := img.RawManifest()
			if err != nil {
				return err
			}
			if sum, _, err := v1.SHA256(bytes.NewReader(raw)); err != nil || sum != d.Digest {
				return Refuse(nil, "its manifest has the digest %v instead of %v", sum, d.Digest)
			}
			config, err := img.Manifest()
			if err != nil {
				return err
			}
			if err := isDocument(f.root, path.Join("blobs", config.Config.Digest.Algorithm, config.Config.Digest.Hex)); err != nil {
				return err
			}
			f.found[d.Digest] = img
		case d.MediaType.IsIndex() && depth < 4:
			if err := isDocument(f.root, blob); err != nil {
				return err
			}
			in, err := index.ImageIndex(d.Digest)
			if err != nil {
				return err
			}
			if err := f.index(in, "", depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// isDocument returns an error unless file is a regular file that is small enough to be
// read into memory.
func isDocument(root *os.Root, file string) error {
	info, err := root.Lstat(file)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() > maxDocument {
		return Refuse(nil, "%s is not a file of at most %d bytes", file, maxDocument)
	}
	return nil
}

// Archive opens an image in an uncompressed tar archive, which is docker save's or has an
// OCI image layout. tag names the image. It may be empty if the archive has only one image.
// Until Close, temporary files take at most limits.Bytes in a new folder in tmp.
func Archive(ctx context.Context, file, tag, tmp string, limits Limits) (*Image, error) {
	img, err := openArchive(ctx, file, tag, tmp, limits)
	if err != nil {
		return nil, fmt.Errorf("image archive %s: %w", file, err)
	}
	if limits.Packed > 0 {
		img.packed = limits.Packed
	}
	return img, nil
}

func openArchive(ctx context.Context, file, tag, tmp string, limits Limits) (*Image, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sizes, err := contents(ctx, f)
	if err != nil {
		return nil, err
	}
	if _, ok := sizes["index.json"]; !ok {
		return openSaved(file, tag, sizes)
	}
	dir, err := os.MkdirTemp(tmp, "layout-")
	if err != nil {
		return nil, err
	}
	remove := func() error { return os.RemoveAll(dir) }
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, errors.Join(err, remove())
	}
	if err := extractLayout(ctx, f, dir, limits); err != nil {
		return nil, errors.Join(err, remove())
	}
	return openLayout(dir, tag, remove)
}

// contents returns the names and sizes of an archive's files. It refuses sparse files,
// which are larger than they look.
func contents(ctx context.Context, f io.Reader) (map[string]int64, error) {
	sizes := map[string]int64{}
	t := tar.NewReader(contextReader{ctx, f})
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return sizes, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read archive: %w", err)
		}
		for key := range maps.Keys(h.PAXRecords) {
			if strings.HasPrefix(key, "GNU.sparse.") {
				return nil, Refuse(nil, "it has a sparse file")
			}
		}
		if h.Typeflag == tar.TypeGNUSparse {
			return nil, Refuse(nil, "it has a sparse file")
		}
		if sizes[path.Clean(h.Name)] = h.Size; len(sizes) > maxBlobs {
			return nil, Refuse(nil, "it has more than %d files", maxBlobs)
		}
	}
}

// openSaved opens an image in an archive of docker save's older format.
func openSaved(file, tag string, sizes map[string]int64) (*Image, error) {
	opener := func() (io.ReadCloser, error) { return os.Open(file) }
	if size, ok := sizes["manifest.json"]; !ok || size > maxDocument {
		return nil, Refuse(nil, "it has neither an index.json nor a manifest.json of at most %d bytes", maxDocument)
	}
	m, err := tarball.LoadManifest(opener)
	if err != nil {
		return nil, err
	}
	wanted, err := tagOf(tag)
	if err != nil {
		return nil, err
	}
	var ids []int
	for i, d := range m {
		// Compare full names, because a tag may leave out the registry.
		if wanted == nil || slices.ContainsFunc(d.RepoTags, func(s string) bool {
			t, err := name.NewTag(s)
			return err == nil && t.Name() == wanted.Name()
		}) {
			ids = append(ids, i)
		}
	}
	if len(ids) != 1 {
		return nil, fmt.Errorf("it has %d images with the name %q instead of one", len(ids), tag)
	}
	d := m[ids[0]]
	if size, ok := sizes[path.Clean(d.Config)]; !ok || size > maxDocument {
		return nil, Refuse(nil, "it has no configuration of at most %d bytes", maxDocument)
	}
	if len(d.Layers) > maxLayers {
		return nil, Refuse(nil, "it has %d layers, more than %d", len(d.Layers), maxLayers)
	}
	img, err := tarball.Image(opener, wanted)
	if err != nil {
		return nil, err
	}
	return newImage(img, func() error { return nil })
}

// tagOf parses a tag. It returns nil if s is empty.
func tagOf(s string) (*name.Tag, error) {
	if s == "" {
		return nil, nil
	}
	t, err := name.NewTag(s)
	if err != nil {
		return nil, err
	}
	return &t, nil
}

// extractLayout extracts an archive's regular files, but no links, to dir.
func extractLayout(ctx context.Context, f io.Reader, dir string, limits Limits) error {
	limits = limits.orDefault()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	left := limits.Bytes
	t := tar.NewReader(contextReader{ctx, f})
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		to := path.Clean(h.Name)
		if h.Typeflag != tar.TypeReg || !filepath.IsLocal(to) {
			continue // not part of a layout, such as links for manifest.json
		}
		if left -= h.Size; left < 0 {
			return Refuse(nil, "it has more than %d bytes", limits.Bytes)
		}
		if limits.Reserve != nil {
			if err := limits.Reserve(h.Size); err != nil {
				return err
			}
		}
		if err := root.MkdirAll(path.Dir(to), 0o700); err != nil {
			return err
		}
		out, err := root.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		err = limits.Room.During(h.Size, func() error {
			_, err := io.Copy(out, t)
			return err
		})
		if err := errors.Join(err, out.Close()); err != nil {
			return fmt.Errorf("extract %s: %w", to, err)
		}
	}
}

type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(b)
}
