package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/wrenn-dev/wrenn/internal/agent/sparse"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
)

// Copy makes dst, which must not be there, the same as the file src and
// independent of it, to be read by its owner, the caller, alone. Where the file
// system can the two share their blocks; holes stay holes. dst and its name are
// synced when it returns; when it fails there is no dst.
func Copy(ctx context.Context, dst, src string) error {
	in, _, err := openRegular(src)
	if err != nil {
		return fmt.Errorf("copy disk: %w", err)
	}
	defer in.Close()
	err = create(dst, func(out *os.File) error {
		return errors.Join(sparse.Copy(ctx, out, in), out.Chmod(0o400))
	})
	if err != nil {
		return fmt.Errorf("copy disk: %w", err)
	}
	return nil
}

// create makes a new file, has it written and syncs it and its name. When
// that fails there is no file.
func create(path string, write func(f *os.File) error) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return atomicfile.Sync(filepath.Dir(path))
}
