// Package sparse copies and measures files that have holes.
package sparse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// step is the number of bytes copied between two checks of the context.
const step = 16 << 20

// Copy copies src to dst, which must be empty. If the file system supports it, the files
// then share their blocks (ioctl_ficlone(2)); otherwise Copy copies everything but holes.
// It does not sync dst. After an error, dst has a part of src.
func Copy(ctx context.Context, dst, src *os.File) error {
	if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err == nil {
		return nil
	}
	info, err := src.Stat()
	if err != nil {
		return fmt.Errorf("copy file: %w", err)
	}
	for r, err := range Data(src, Range{0, info.Size()}) {
		if err == nil {
			err = copyRange(ctx, dst, src, r)
		}
		if err != nil {
			return fmt.Errorf("copy file: %w", err)
		}
	}
	if err := dst.Truncate(info.Size()); err != nil {
		return fmt.Errorf("copy file: %w", err)
	}
	return nil
}

// Allocated returns the bytes that a file takes on its disk, or in memory on a tmpfs.
// Holes take none.
func Allocated(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}

// Range is a part of a file, in bytes.
type Range struct{ Start, End int64 }

// Data yields the parts of r in f that are not holes, in order. It ends after the first
// error. It moves f's offset.
func Data(f *os.File, r Range) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		for at := r.Start; at < r.End; {
			start, err := f.Seek(at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) || err == nil && start >= r.End {
				return // holes to the end
			}
			var end int64
			if err == nil {
				end, err = f.Seek(start, unix.SEEK_HOLE)
			}
			if err != nil {
				yield(Range{}, err)
				return
			}
			if !yield(Range{start, min(end, r.End)}, nil) {
				return
			}
			at = end
		}
	}
}

// copyRange copies r within the kernel if possible (copy_file_range(2)).
func copyRange(ctx context.Context, dst, src *os.File, r Range) error {
	for r.Start < r.End {
		if err := ctx.Err(); err != nil {
			return err
		}
		from, to := r.Start, r.Start
		n, err := unix.CopyFileRange(int(src.Fd()), &from, int(dst.Fd()), &to, int(min(r.End-r.Start, step)), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
			return copyHere(ctx, dst, src, r)
		case err != nil:
			return os.NewSyscallError("copy_file_range", err)
		case n == 0:
			return io.ErrUnexpectedEOF // src shrank
		}
		r.Start += int64(n)
	}
	return nil
}

// copyHere copies r through a buffer of this process.
func copyHere(ctx context.Context, dst, src *os.File, r Range) error {
	buf := make([]byte, min(1<<20, r.End-r.Start))
	for r.Start < r.End {
		if err := ctx.Err(); err != nil {
			return err
		}
		part := buf[:min(int64(len(buf)), r.End-r.Start)]
		if _, err := io.ReadFull(io.NewSectionReader(src, r.Start, math.MaxInt64-r.Start), part); err != nil {
			return err
		}
		if _, err := dst.WriteAt(part, r.Start); err != nil {
			return err
		}
		r.Start += int64(len(part))
	}
	return nil
}
