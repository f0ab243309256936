package memory

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// stripeBlocks is the number of blocks that a worker of Materialize copies at a time.
const stripeBlocks = 4096

// Materialize copies the whole memory to a file in RAM (memfd_create(2)) with the given
// name, and seals it, so that nobody can change it. Blocks of zeros are holes and take no
// RAM. The caller must close the file.
func (m *Image) Materialize(ctx context.Context, name string) (_ *os.File, err error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("materialize memory: %w", os.NewSyscallError("memfd_create", err))
	}
	f := os.NewFile(uintptr(fd), name)
	defer func() {
		if err != nil {
			f.Close()
			err = fmt.Errorf("materialize memory: %w", err)
		}
	}()
	if err := f.Truncate(m.Size()); err != nil {
		return nil, err
	}
	var next atomic.Uint64
	g, ctx := errgroup.WithContext(ctx)
	for range min(runtime.GOMAXPROCS(0), 8) {
		g.Go(func() error {
			buf := make([]byte, chunkBytes)
			for {
				first := (next.Add(1) - 1) * stripeBlocks
				if first >= m.h.blocks {
					return nil
				}
				if err := m.copyTo(ctx, f, first, min(first+stripeBlocks, m.h.blocks), buf); err != nil {
					return err
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return f, nil
}

// copyTo copies the blocks from first up to end to f, except those of zeros.
func (m *Image) copyTo(ctx context.Context, f *os.File, first, end uint64, buf []byte) error {
	for first < end {
		e := m.h.lookup(first)
		e.count = min(e.count, end-first)
		first = e.end()
		if e.layer == zeroLayer {
			continue
		}
		for p, err := range m.read(ctx, e, buf) {
			if err == nil {
				_, err = f.WriteAt(p.data, int64(p.first)*BlockSize)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}
