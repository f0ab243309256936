package files

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"time"
)

// content is the content of an open file. Files in /proc and /sys have a wrong size, and
// any file can change while it is read. So the length of a small file is what was read,
// and only larger files use their size.
type content struct {
	file *os.File
	head []byte // the first [buffer] bytes, or the whole file if it has fewer
	size int64  // of the file; -1: not known
}

// endReads ends reads of f when ctx is done, until stop is called, because some files,
// such as /proc/kmsg, block for a long time.
func endReads(ctx context.Context, f *os.File) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
}

// open reads the beginning of a file.
func open(f *os.File) (*content, error) {
	head := make([]byte, buffer)
	n, err := io.ReadFull(f, head)
	c := &content{file: f, head: head[:n], size: int64(n)}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return c, nil
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if c.size = info.Size(); c.size <= buffer {
		// There may be no more data, but then the size is wrong, too.
		c.size = -1
	}
	return c, nil
}

// whole reports whether head is the whole file.
func (c *content) whole() bool { return len(c.head) < buffer }

// all returns a reader of the file, up to the size that it had when it was opened, so
// that reading a log that grows quickly ends, too.
func (c *content) all() io.Reader {
	head := bytes.NewReader(c.head)
	switch {
	case c.whole():
		return head
	case c.size < 0:
		return io.MultiReader(head, c.file)
	}
	return io.MultiReader(head, io.LimitReader(c.file, c.size-int64(len(c.head))))
}
