package image

import (
	"encoding/binary"
	"errors"
	"testing"
)

func bzImage(size int, offset, length uint32) []byte {
	b := make([]byte, size)
	b[0x1f1] = 1
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x20f)
	binary.LittleEndian.PutUint32(b[0x248:], offset)
	binary.LittleEndian.PutUint32(b[0x24c:], length)
	return b
}

func TestPayload(t *testing.T) {
	b := bzImage(2048, 16, 100)
	got, err := payload(b)
	if err != nil || len(got) != 100 || &got[0] != &b[1024+16] {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	for _, bad := range [][]byte{nil, make([]byte, 4096), bzImage(2048, 2000, 100), bzImage(2048, 1<<32-1, 1<<32-1), bzImage(2048, 0, 0)} {
		if _, err := payload(bad); !errors.Is(err, errNoKernel) {
			t.Errorf("got %v, want errNoKernel", err)
		}
	}
}

func FuzzPayload(f *testing.F) {
	f.Add(bzImage(2048, 16, 100))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = payload(b) })
}
