package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"mime/multipart"
	"syscall"
)

type unixStat = syscall.Stat_t

// maxParts bounds the files of one upload.
const maxParts = 10_000

// parts calls f with the name and contents of each part called "file".
func parts(body io.Reader, boundary string, f func(name string, part io.Reader) error) error {
	if boundary == "" {
		return fmt.Errorf("multipart body without a boundary: %w", fs.ErrInvalid)
	}
	r := multipart.NewReader(body, boundary)
	for n := 0; ; {
		p, err := r.NextRawPart()
		if err == io.EOF {
			if n == 0 {
				return fmt.Errorf("no part is called %q: %w", "file", fs.ErrInvalid)
			}
			return nil
		}
		if err != nil {
			return errors.Join(errClient, err)
		}
		if p.FormName() != "file" {
			continue
		}
		if n++; n > maxParts {
			return fmt.Errorf("more than %d files: %w", maxParts, fs.ErrInvalid)
		}
		// Part.FileName drops directories, but here the name is a path.
		_, params, _ := mime.ParseMediaType(p.Header.Get("Content-Disposition"))
		if err := f(params["filename"], clientReader{p}); err != nil {
			return err
		}
	}
}
