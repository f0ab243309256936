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

// Copy copies the file src to dst, which must not exist and which only the caller's user
// can read. If the file system supports it, the files share their blocks; holes stay
// holes. dst and its folder are synced when Copy returns. After an error there is no dst.
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

// create makes a new file, calls write, and syncs the file and its folder. After an
// error there is no file.
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
