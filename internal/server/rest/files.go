package rest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/patience"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
)

// chunk is the size of a message of file data, in bytes.
const chunk = 256 << 10

// file returns a request's file and the host of its running sandbox.
func (a *API) file(r *http.Request, sandbox, path string, user *string) (*hosts.Host, *hostagentv1.FileRef, error) {
	u, err := sandboxID(sandbox)
	if err != nil {
		return nil, nil, err
	}
	for part := range strings.SplitSeq(path, "/") {
		if part == ".." {
			return nil, nil, fault.New(fault.InvalidArgument, "path: must not contain '..'")
		}
	}
	host, err := a.Sandboxes.Use(r.Context(), caller(r).Team, u)
	if err != nil {
		return nil, nil, err
	}
	return host, &hostagentv1.FileRef{SandboxId: sandbox, Path: path, User: or(user, "")}, nil
}

// fileFault is [hosts.Fault], but exhausted resources mean that the sandbox's disk is
// full.
func fileFault(err error) error {
	f := hosts.Fault(err)
	if fault.Is(f, fault.NoCapacity) {
		return fault.Because(err, fault.NoSpace, "%s", hosts.Message(err))
	}
	return f
}

// byteRange is a parsed Range header: bytes first to last, inclusive. If first is -1, it
// is the last suffix bytes.
type byteRange struct{ first, last, suffix int64 }

// toEnd is the last byte of a range without an end. No file is that large, and the length
// of a range from 0 to it does not overflow.
const toEnd = math.MaxInt64 - 1

// parseRange parses a Range header with one range. HTTP requires that an invalid header
// is ignored.
func parseRange(header string) (byteRange, bool) {
	spec, ok := strings.CutPrefix(strings.ReplaceAll(header, " ", ""), "bytes=")
	if !ok || strings.Contains(spec, ",") {
		return byteRange{}, false
	}
	from, to, ok := strings.Cut(spec, "-")
	if !ok {
		return byteRange{}, false
	}
	digits := func(s string) (int64, bool) {
		n, err := strconv.ParseUint(s, 10, 63)
		return int64(min(n, toEnd)), err == nil
	}
	if from == "" {
		n, ok := digits(to)
		return byteRange{first: -1, suffix: n}, ok
	}
	first, ok := digits(from)
	if !ok {
		return byteRange{}, false
	}
	if to == "" {
		return byteRange{first: first, last: toEnd}, true
	}
	last, ok := digits(to)
	return byteRange{first: first, last: last}, ok && last >= first
}

// ReadFile answers GET /v1/sandboxes/{sandbox_id}/files.
func (a *API) ReadFile(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID, params rest.ReadFileParams) {
	host, ref, err := a.file(r, sandbox, params.Path, params.User)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	rng, partial := parseRange(or(params.Range, ""))
	// Files have no validators, so an If-Range never matches.
	partial = partial && params.IfRange == nil
	req := &hostagentv1.ReadFileStreamRequest{File: ref}
	// The guest reports a large file's size only if the request has a length.
	switch {
	case partial && rng.first >= 0:
		req.Offset, req.Length = rng.first, rng.last-rng.first+1
	case partial || r.Method == http.MethodHead:
		req.Length = 1
	}
	stream, size, err := openRead(r, host, req)
	if err == nil && partial && rng.first < 0 && (size < 0 || size > 0 && rng.suffix > 0) {
		// The first response has the file's size, from which the last bytes' offset
		// follows. If the guest does not know the size, the client gets the whole file.
		req = &hostagentv1.ReadFileStreamRequest{File: ref}
		if partial = size > 0; partial {
			rng.first, rng.last = max(size-rng.suffix, 0), size-1
			req.Offset, req.Length = rng.first, size-rng.first
		}
		stream.Close()
		stream, size, err = openRead(r, host, req)
	}
	if err != nil && !fault.Is(err, fault.RangeNotSatisfiable) {
		a.Fail(w, r, err)
		return
	}
	if stream != nil {
		defer stream.Close()
	}
	if err != nil || partial && size >= 0 && (rng.first < 0 || rng.first >= size) {
		if size >= 0 {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
		}
		a.Fail(w, r, fault.New(fault.RangeNotSatisfiable, "the file has no such range"))
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Accept-Ranges", "bytes")
	switch {
	case partial && size >= 0:
		last := min(size-1, rng.last)
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", rng.first, last, size))
		h.Set("Content-Length", strconv.FormatInt(last-rng.first+1, 10))
		w.WriteHeader(http.StatusPartialContent)
	case size > 0:
		// Files in /proc report size 0 but have content.
		h.Set("Content-Length", strconv.FormatInt(size, 10))
	}
	a.copyOut(w, r, stream)
}

// openRead opens a file on a host and returns its whole size; -1 if unknown.
func openRead(r *http.Request, host *hosts.Host, req *hostagentv1.ReadFileStreamRequest) (*connect.ServerStreamForClient[hostagentv1.ReadFileStreamResponse], int64, error) {
	stream, err := host.Agent.ReadFileStream(r.Context(), connect.NewRequest(req))
	if err != nil {
		return nil, -1, fileFault(err)
	}
	if !stream.Receive() {
		err := stream.Err()
		stream.Close()
		if err == nil {
			err = connect.NewError(connect.CodeUnavailable, errors.New("stream closed before the first message"))
		}
		return nil, -1, fileFault(err)
	}
	start, ok := stream.Msg().Message.(*hostagentv1.ReadFileStreamResponse_Start_)
	if !ok {
		stream.Close()
		return nil, -1, errors.New("read file: the host's first message was not start")
	}
	return stream, start.Start.GetSize(), nil
}

// copyOut forwards a stream to the client. If the stream fails, it closes the connection,
// so that the client does not take a part for the whole.
func (a *API) copyOut(w http.ResponseWriter, r *http.Request, stream *connect.ServerStreamForClient[hostagentv1.ReadFileStreamResponse]) {
	if r.Method == http.MethodHead {
		_, _ = w.Write(nil) // HEAD has no body.
		return
	}
	for stream.Receive() {
		if _, err := w.Write(stream.Msg().GetChunk()); err != nil {
			return
		}
	}
	if err := stream.Err(); err != nil {
		a.log(r).Warn("read file", "error", err)
		panic(http.ErrAbortHandler)
	}
}

// WriteFile answers PUT /v1/sandboxes/{sandbox_id}/files.
func (a *API) WriteFile(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID, params rest.WriteFileParams) {
	a.write(w, r, sandbox, params.Path, params.User, false)
}

// WriteArchive answers PUT /v1/sandboxes/{sandbox_id}/archive.
func (a *API) WriteArchive(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID, params rest.WriteArchiveParams) {
	a.write(w, r, sandbox, params.Path, params.User, true)
}

func (a *API) write(w http.ResponseWriter, r *http.Request, sandbox, path string, user *string, archive bool) {
	host, ref, err := a.file(r, sandbox, path, user)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	info, err := copyIn(r, host, &hostagentv1.WriteFileStreamRequest_Start{File: ref, Archive: archive})
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, rest.FileInfo{Path: info.GetPath(), Name: info.GetName(), Size: info.GetSize()})
}

// copyIn forwards a request's body to the host. If the body ends early, it cancels the
// call, so that the host does not take a part for the whole.
func copyIn(r *http.Request, host *hosts.Host, start *hostagentv1.WriteFileStreamRequest_Start) (*hostagentv1.FileInfo, error) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	stream := host.Agent.WriteFileStream(ctx)
	err := stream.Send(&hostagentv1.WriteFileStreamRequest{Message: &hostagentv1.WriteFileStreamRequest_Start_{Start: start}})
	buf := make([]byte, chunk)
	for err == nil {
		n, readErr := r.Body.Read(buf)
		if n > 0 {
			err = sendWithin(patience.Default.Unread, cancel, func() error {
				return stream.Send(&hostagentv1.WriteFileStreamRequest{Message: &hostagentv1.WriteFileStreamRequest_Chunk{Chunk: buf[:n]}})
			})
			if errors.Is(err, errUnread) {
				return nil, err
			}
		}
		if readErr == io.EOF {
			break
		}
		if readErr != nil {
			// Closing the stream would tell the host that the body is complete.
			cancel()
			return nil, fault.Body(readErr)
		}
	}
	// Send only reports that the host failed. CloseAndReceive returns the cause.
	answer, err := stream.CloseAndReceive()
	if err != nil {
		return nil, fileFault(err)
	}
	return answer.Msg.GetFile(), nil
}

// ReadArchive answers GET /v1/sandboxes/{sandbox_id}/archive.
func (a *API) ReadArchive(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID, params rest.ReadArchiveParams) {
	host, ref, err := a.file(r, sandbox, params.Path, params.User)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	stream, _, err := openRead(r, host, &hostagentv1.ReadFileStreamRequest{File: ref, Archive: true})
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	defer stream.Close()
	w.Header().Set("Content-Type", "application/x-tar")
	a.copyOut(w, r, stream)
}
