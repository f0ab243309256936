package files

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"time"
)

// content is what is in an open file. The kernel gives its own files (in /proc and
// /sys) a size that is wrong, and any other can change while it is read. So a small
// file is as long as what can be read of it, and only a larger one as its size says.
type content struct {
	file *os.File
	head []byte // the first [buffer] bytes, or the whole file if it has fewer
	size int64  // of the file; -1: not known
}

// endReads ends reads of f when ctx ends, until stop is called: some files have
// nothing to read for a long time (/proc/kmsg).
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
		// There may be no more, but then its size is not what was read either.
		c.size = -1
	}
	return c, nil
}

// whole reports whether head is all that is in the file.
func (c *content) whole() bool { return len(c.head) < buffer }

// all reads the whole file, to the size that it had when it was opened: a log that
// grows faster than it is read has an end too.
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
