package memory

import (
	"fmt"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
)

// CreateZero writes an image of size bytes, all of them zeros, to dir, which must exist and
// be empty. It is the memory of a machine that has not booted. It is only a header.
func CreateZero(dir string, size int64) error {
	if size <= 0 || size%BlockSize != 0 || size/BlockSize > maxBlocks {
		return fmt.Errorf("create memory image: size of %d bytes", size)
	}
	if err := writeHeader(dir, &header{blocks: uint64(size) / BlockSize}); err != nil {
		return fmt.Errorf("create memory image: %w", err)
	}
	return atomicfile.Sync(dir)
}
