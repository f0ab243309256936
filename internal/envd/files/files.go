// Package files serves downloads and uploads of files and archives over plain HTTP, in
// constant memory and with the rights of the request's user.
package files

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/envd/account"
	"github.com/wrenn-dev/wrenn/internal/envd/fault"
	"github.com/wrenn-dev/wrenn/internal/envd/upload"
	"github.com/wrenn-dev/wrenn/internal/nametext"
)

// Register adds /files and /archive to mux. Requests must be authorized and have their
// user in the context (account.NewContext).
func Register(mux *http.ServeMux) {
	mux.HandleFunc("GET /files", download)
	mux.HandleFunc("POST /files", receive)
	mux.HandleFunc("GET /archive", pack)
	mux.HandleFunc("POST /archive", unpack)
}

// requested returns the user and the path of a request.
func requested(r *http.Request) (who *account.Account, path string, err error) {
	if who, err = account.FromContext(r.Context()); err != nil {
		return nil, "", err
	}
	p := r.URL.Query().Get("path")
	if p == "" {
		return nil, "", fmt.Errorf("query parameter path is missing: %w", fs.ErrInvalid)
	}
	path, err = who.Resolve(p)
	return who, path, err
}

// openFile opens a regular file for reading, with the rights of the calling thread.
func openFile(path string) (*os.File, fs.FileInfo, error) {
	// Nonblocking, because opening a FIFO would wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
			err = notRegular(path)
		}
		return nil, nil, err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case info.IsDir():
		err = &fs.PathError{Op: "read", Path: path, Err: unix.EISDIR}
	case !info.Mode().IsRegular():
		err = notRegular(path)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

func notRegular(path string) error {
	return fmt.Errorf("%s is not a regular file: %w", path, fs.ErrInvalid)
}

func download(w http.ResponseWriter, r *http.Request) {
	who, path, err := requested(r)
	var f *os.File
	var info fs.FileInfo
	if err == nil {
		err = who.Do(func() error {
			f, info, err = openFile(path)
			return err
		})
	}
	if err != nil {
		fault.WriteError(w, err)
		return
	}
	defer f.Close()

	h := w.Header()
	h.Add("Vary", "Accept-Encoding")
	zip, ok := negotiate(r.Header.Values("Accept-Encoding"))
	if r.Header.Get("Range") != "" && zip {
		// Ranges are of the file's own bytes, so they need identity.
		if _, identity := negotiate([]string{"gzip;q=0, " + strings.Join(r.Header.Values("Accept-Encoding"), ",")}); identity {
			zip = false
		}
	}
	if !ok {
		fault.Write(w, http.StatusNotAcceptable, connect.CodeInvalidArgument, "only the encodings identity and gzip are offered")
		return
	}
	defer endReads(r.Context(), f)()
	c, err := open(f)
	if err != nil {
		fault.WriteError(w, err)
		return
	}
	h.Set("Content-Type", "application/octet-stream")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": info.Name()}))
	switch {
	case zip:
		h.Set("Content-Encoding", "gzip")
		h.Set("Last-Modified", info.ModTime().UTC().Format(http.TimeFormat))
		if r.Method == http.MethodHead {
			return
		}
		z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
		if _, err = io.Copy(z, c.all()); err == nil {
			err = z.Close()
		}
	case c.whole():
		http.ServeContent(w, r, "", info.ModTime(), bytes.NewReader(c.head))
	case c.size < 0:
		// Without a size there are no ranges, and the length is only known after reading.
		if r.Method == http.MethodHead {
			return
		}
		_, err = io.Copy(w, c.all())
	case r.Method == http.MethodHead || r.Header.Get("Range") != "" || r.Header.Get("If-Modified-Since") != "" || r.Header.Get("If-Unmodified-Since") != "":
		http.ServeContent(w, r, "", info.ModTime(), f)
	default:
		// Without Content-Length, because the file may be truncated before it is read.
		h.Set("Accept-Ranges", "bytes")
		h.Set("Last-Modified", info.ModTime().UTC().Format(http.TimeFormat))
		_, err = io.Copy(w, c.all())
	}
	if err != nil {
		// The status is sent, so only a broken connection can report the failure.
		panic(http.ErrAbortHandler)
	}
}

// negotiate chooses between gzip and identity by Accept-Encoding. The default is identity,
// unless the client names gzip or refuses identity. ok is false if it refuses both.
func negotiate(accept []string) (zip, ok bool) {
	gzipQ, identityQ, anyQ := -1.0, -1.0, -1.0
	for part := range strings.SplitSeq(strings.Join(accept, ","), ",") {
		name, params, _ := strings.Cut(part, ";")
		q := 1.0
		for p := range strings.SplitSeq(params, ";") {
			if v, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(p)), "q="); ok {
				f, err := strconv.ParseFloat(v, 64)
				if err != nil || !(f >= 0 && f <= 1) {
					f = 0
				}
				q = f
			}
		}
		var to *float64
		switch strings.ToLower(strings.TrimSpace(name)) {
		case "gzip", "x-gzip":
			to = &gzipQ
		case "identity":
			to = &identityQ
		case "*":
			to = &anyQ
		default:
			continue
		}
		if *to < 0 { // the first mention counts
			*to = q
		}
	}
	named := gzipQ > 0
	if gzipQ < 0 {
		gzipQ = max(anyQ, 0)
	}
	if identityQ < 0 {
		identityQ = 1e-9 // always acceptable, unless refused
		if anyQ == 0 {
			identityQ = 0
		}
	}
	switch {
	case gzipQ > 0 && (identityQ == 0 || (named && gzipQ >= identityQ)):
		return true, true
	case identityQ > 0:
		return false, true
	}
	return false, false
}

// written describes one file in the response to an upload.
type written struct {
	Path string `json:"path"`
	Name string `json:"name"`
	Type string `json:"type"`
}

func receive(w http.ResponseWriter, r *http.Request) {
	who, err := account.FromContext(r.Context())
	if err != nil {
		fault.WriteError(w, err)
		return
	}
	body, err := decoded(r)
	if err != nil {
		fault.WriteError(w, err)
		return
	}
	given := r.URL.Query().Get("path")
	media, params, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	list := []written{}
	put := func(path string, from io.Reader, size int64) error {
		path, err := who.Resolve(path)
		if err != nil {
			return err
		}
		for _, before := range list {
			if before.Path == nametext.Text(path) {
				return fmt.Errorf("%s appears twice: %w", path, fs.ErrInvalid)
			}
		}
		if err := write(who, path, from, size); err != nil {
			return err
		}
		list = append(list, written{nametext.Text(path), nametext.Text(filepath.Base(path)), "file"})
		return nil
	}
	if media == "multipart/form-data" {
		err = parts(body, params["boundary"], func(name string, part io.Reader) error {
			if given != "" {
				name = given
			}
			if name == "" {
				return fmt.Errorf("neither the query nor the part names a path: %w", fs.ErrInvalid)
			}
			return put(name, part, -1)
		})
	} else {
		size := r.ContentLength
		if r.Header.Get("Content-Encoding") != "" {
			size = -1
		}
		if given == "" {
			err = fmt.Errorf("query parameter path is missing: %w", fs.ErrInvalid)
		} else {
			err = put(given, body, size)
		}
	}
	if err != nil {
		fault.WriteError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list)
}

// decoded returns a request's body without its content encoding.
func decoded(r *http.Request) (io.Reader, error) {
	body := clientReader{r.Body}
	switch enc := strings.ToLower(strings.TrimSpace(r.Header.Get("Content-Encoding"))); enc {
	case "", "identity":
		return body, nil
	case "gzip", "x-gzip":
		z, err := gzip.NewReader(body)
		if err != nil {
			return nil, fmt.Errorf("read gzip: %w", errors.Join(errClient, err))
		}
		return clientReader{z}, nil
	default:
		return nil, fmt.Errorf("content encoding %q is not supported: %w", enc, fs.ErrInvalid)
	}
}

// errClient marks an error as the client's fault: its body is incomplete or malformed.
var errClient = fmt.Errorf("request body: %w", fs.ErrInvalid)

// clientReader marks errors of reading a body as the client's fault.
type clientReader struct{ r io.Reader }

func (c clientReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if err != nil && err != io.EOF {
		err = errors.Join(errClient, err)
	}
	return n, err
}

// buffer is how many bytes of a transfer are in memory.
const buffer = 128 << 10

// write replaces the file at path with the content of from. If it fails, the old file is
// unchanged, unless it had to be written in place. size is the expected size (-1:
// unknown).
func write(who *account.Account, path string, from io.Reader, size int64) error {
	var t target
	if err := who.Do(func() (err error) {
		t, err = prepare(who, path, size)
		return err
	}); err != nil {
		return err
	}
	_, err := io.CopyBuffer(struct{ io.Writer }{t.file}, struct{ io.Reader }{from}, make([]byte, buffer))
	if err == nil && t.temp != "" && t.mode != nil {
		err = t.file.Chmod(*t.mode)
	}
	// A full file system can be reported only at Close.
	if e := t.file.Close(); err == nil {
		err = e
	}
	if t.temp == "" {
		return err
	}
	return who.Do(func() error {
		if err == nil {
			err = meant(os.Rename(t.temp, t.path), t.path)
		}
		if err != nil {
			_ = os.Remove(t.temp)
		}
		return err
	})
}

// meant replaces an upload's temporary name in err by path, which the client knows.
func meant(err error, path string) error {
	var pe *fs.PathError
	var le *os.LinkError
	switch {
	case errors.As(err, &pe):
		return &fs.PathError{Op: "write", Path: path, Err: pe.Err}
	case errors.As(err, &le):
		return &fs.PathError{Op: "write", Path: path, Err: le.Err}
	}
	return err
}

// target is the file that an upload writes.
type target struct {
	path string   // final path, with no symbolic link at its end
	temp string   // temporary file that is renamed to path; "": path is written in place
	file *os.File // open for writing
	mode *fs.FileMode
}

// prepare opens the target of an upload to path, with the rights of the calling thread,
// which must be who's.
func prepare(who *account.Account, path string, size int64) (target, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return target{}, err
	}
	path, err := follow(path)
	if err != nil {
		return target{}, err
	}
	if err := room(filepath.Dir(path), size); err != nil {
		return target{}, err
	}
	t := target{path: path}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		t.temp = filepath.Join(filepath.Dir(path), upload.Name(upload.Fresh))
		t.file, err = os.OpenFile(t.temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		return t, meant(err, path)
	}
	switch {
	case err != nil:
		return target{}, err
	case info.IsDir():
		return target{}, &fs.PathError{Op: "write", Path: path, Err: unix.EISDIR}
	case !info.Mode().IsRegular():
		return target{}, notRegular(path)
	}
	// A rename only needs permission for the directory, but a user who may not write a
	// file must not replace it either.
	if err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS); err != nil {
		return target{}, &fs.PathError{Op: "write", Path: path, Err: err}
	}
	t.temp = filepath.Join(filepath.Dir(path), upload.Name(upload.Over))
	t.file, err = os.OpenFile(t.temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		st := info.Sys().(*unixStat)
		if err = unix.Fchown(int(t.file.Fd()), int(st.Uid), int(st.Gid)); err == nil {
			t.mode = new(info.Mode())
			return t, nil
		}
		t.file.Close()
		_ = os.Remove(t.temp)
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return target{}, err
	}
	// Write in place if the file cannot be replaced by an equal one, because the user may
	// not write the directory or the owner differs.
	t.temp = ""
	t.file, err = os.OpenFile(path, os.O_WRONLY|os.O_TRUNC|unix.O_NONBLOCK, 0)
	return t, err
}

// follow resolves a symbolic link at the end of path, even if its target does not exist.
func follow(path string) (string, error) {
	for range 40 {
		to, err := os.Readlink(path)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, fs.ErrNotExist) {
			return path, nil
		}
		if err != nil {
			return "", err
		}
		if !filepath.IsAbs(to) {
			// Not with path.Clean, because the part before ".." can be a link.
			dir, err := filepath.EvalSymlinks(filepath.Dir(path))
			if err != nil {
				return "", err
			}
			to = dir + "/" + to
		}
		path = to
	}
	return "", &fs.PathError{Op: "write", Path: path, Err: unix.ELOOP}
}

// room returns an error if a file of the given size does not fit.
func room(dir string, size int64) error {
	var st unix.Statfs_t
	if size <= 0 || unix.Statfs(dir, &st) != nil || st.Bsize <= 0 || st.Blocks == 0 {
		return nil
	}
	if uint64(size)/uint64(st.Bsize) > st.Bavail {
		return &fs.PathError{Op: "write into", Path: dir, Err: unix.ENOSPC}
	}
	return nil
}
