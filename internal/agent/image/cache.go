package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/flock"
)

// tmpPrefix is the prefix of the names of unfinished folders.
const tmpPrefix = ".tmp-"

// lock makes dir, locks it for a build, and tries to remove what killed builds left
// there. Closing the result unlocks it.
func lock(ctx context.Context, dir string, progress func(string)) (io.Closer, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make folder: %w", err)
	}
	f, err := flock.Lock(ctx, filepath.Join(dir, ".lock"))
	if err != nil {
		return nil, fmt.Errorf("wait for another build to end: %w", err)
	}
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tmpPrefix) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	if err != nil {
		progress("warning: cannot remove what a killed build left; the next build tries again: " + err.Error())
	}
	return f, nil
}

// publish syncs the folder tmp and renames it to dir, in place of an earlier dir. If it
// cannot remove the earlier one, the next lock tries again.
func publish(tmp, dir string) error {
	if err := syncTree(tmp); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	old := filepath.Join(filepath.Dir(dir), tmpPrefix+"old-"+uuid.NewString())
	if err := os.Rename(dir, old); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return errors.Join(err, os.Rename(old, dir))
	}
	if err := atomicfile.Sync(filepath.Dir(dir)); err != nil {
		return err
	}
	_ = os.RemoveAll(old)
	return nil
}

// syncTree syncs the files in dir and dir itself.
func syncTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Type().IsRegular() {
			if err := atomicfile.Sync(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return atomicfile.Sync(dir)
}

// digest returns the hexadecimal SHA-256 of the parts, each with its length.
func digest(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func fileDigest(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
