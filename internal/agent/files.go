package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

// file checks a request's reference to a file.
func file(f *pb.FileRef) error {
	path := f.GetPath()
	switch {
	case path == "":
		return invalid("path: must not be empty")
	case len(path) > maxPath:
		return invalid("path: must have at most %d bytes", maxPath)
	case strings.ContainsRune(path, 0):
		return invalid("path: must not contain a NUL byte")
	}
	for part := range strings.SplitSeq(path, "/") {
		if part == ".." {
			return invalid("path: must not contain \"..\"")
		}
	}
	return checkUser(f.GetUser())
}

func fileInfo(i guest.FileInfo) *pb.FileInfo {
	return &pb.FileInfo{Path: i.Path, Name: i.Name, Size: i.Size}
}

// WriteFile implements hostagentv1connect.HostAgentHandler.
func (s *service) WriteFile(ctx context.Context, req *connect.Request[pb.WriteFileRequest]) (*connect.Response[pb.WriteFileResponse], error) {
	f, content := req.Msg.GetFile(), req.Msg.GetContent()
	if err := file(f); err != nil {
		return nil, err
	}
	use, err := s.use(ctx, f.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()
	i, err := use.Guest.Write(use.Context, f.GetUser(), f.GetPath(), bytes.NewReader(content), int64(len(content)))
	if err != nil {
		return nil, s.fault(ctx, "write file", callError(use, err))
	}
	return connect.NewResponse(&pb.WriteFileResponse{File: fileInfo(i)}), nil
}

// ReadFile implements hostagentv1connect.HostAgentHandler.
func (s *service) ReadFile(ctx context.Context, req *connect.Request[pb.ReadFileRequest]) (*connect.Response[pb.ReadFileResponse], error) {
	f := req.Msg.GetFile()
	if err := file(f); err != nil {
		return nil, err
	}
	use, err := s.use(ctx, f.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()
	body, _, err := use.Guest.Read(use.Context, f.GetUser(), f.GetPath(), 0, 0)
	if err != nil {
		return nil, s.fault(ctx, "read file", useError(use, err))
	}
	defer body.Close()
	content, err := io.ReadAll(io.LimitReader(body, maxFile+1))
	if err != nil {
		return nil, s.fault(ctx, "read file", useError(use, err))
	}
	if len(content) > maxFile {
		return nil, connect.NewError(connect.CodeResourceExhausted, clienterr.New("the file is larger than %d MiB; read it as a stream", maxFile>>20))
	}
	return connect.NewResponse(&pb.ReadFileResponse{Content: content}), nil
}

// WriteFileStream implements hostagentv1connect.HostAgentHandler.
func (s *service) WriteFileStream(ctx context.Context, stream *connect.ClientStream[pb.WriteFileStreamRequest]) (*connect.Response[pb.WriteFileStreamResponse], error) {
	if !stream.Receive() {
		if err := stream.Err(); err != nil {
			return nil, err
		}
		return nil, invalid("the first message must be start")
	}
	start := stream.Msg().GetStart()
	if start == nil {
		return nil, invalid("the first message must be start")
	}
	f, archive := start.GetFile(), start.GetArchive()
	if err := file(f); err != nil {
		return nil, err
	}
	if err := checkUser(strings.Replace(start.GetOwner(), ":", "", 1)); err != nil {
		return nil, err
	}
	use, err := s.use(ctx, f.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()

	r, w := io.Pipe()
	var broken error
	received := make(chan struct{})
	go func() {
		defer close(received)
		broken = receive(stream, w)
		w.CloseWithError(broken) // nil: end of file
	}()
	res := &pb.WriteFileStreamResponse{}
	if archive {
		err = use.Guest.Unpack(use.Context, f.GetUser(), f.GetPath(), start.GetOwner(), r)
		res.File = &pb.FileInfo{Path: f.GetPath()}
	} else {
		var i guest.FileInfo
		i, err = use.Guest.Write(use.Context, f.GetUser(), f.GetPath(), r, -1)
		res.File = fileInfo(i)
	}
	r.CloseWithError(errEnough)
	if err != nil {
		endReceiving(ctx)
	}
	<-received
	if err != nil {
		if broken != nil && !errors.Is(broken, errEnough) && !errors.Is(broken, os.ErrDeadlineExceeded) && !guest.Said(err) {
			err = broken // the write failed because the client's stream did
		}
		return nil, s.fault(ctx, "write file", callError(use, err))
	}
	return connect.NewResponse(res), nil
}

// errEnough closes a pipe whose reader needs no more content.
var errEnough = errors.New("no more content is needed")

// receive writes a stream's chunks to w until the stream ends.
func receive(stream *connect.ClientStream[pb.WriteFileStreamRequest], w io.Writer) error {
	for stream.Receive() {
		c, ok := stream.Msg().GetMessage().(*pb.WriteFileStreamRequest_Chunk)
		if !ok {
			return invalid("every message after the first must be a chunk")
		}
		if _, err := w.Write(c.Chunk); err != nil {
			return err
		}
	}
	return stream.Err()
}

// ReadFileStream implements hostagentv1connect.HostAgentHandler.
func (s *service) ReadFileStream(ctx context.Context, req *connect.Request[pb.ReadFileStreamRequest], stream *connect.ServerStream[pb.ReadFileStreamResponse]) error {
	m := req.Msg
	f := m.GetFile()
	if err := file(f); err != nil {
		return err
	}
	if m.GetOffset() < 0 || m.GetLength() < 0 || m.GetOffset()+m.GetLength() < 0 {
		return invalid("offset and length: must not be negative, and their sum must fit into 64 bits")
	}
	if m.GetArchive() && (m.GetOffset() > 0 || m.GetLength() > 0) {
		return invalid("offset and length: must be 0 for an archive")
	}
	use, err := s.use(ctx, f.GetSandboxId())
	if err != nil {
		return err
	}
	defer use.End()
	var body io.ReadCloser
	total := int64(-1)
	if m.GetArchive() {
		body, err = use.Guest.Pack(use.Context, f.GetUser(), f.GetPath())
	} else {
		body, total, err = use.Guest.Read(use.Context, f.GetUser(), f.GetPath(), m.GetOffset(), m.GetLength())
	}
	if err != nil {
		return s.fault(ctx, "read file", useError(use, err))
	}
	defer body.Close()
	err = stream.Send(&pb.ReadFileStreamResponse{Message: &pb.ReadFileStreamResponse_Start_{Start: &pb.ReadFileStreamResponse_Start{Size: total}}})
	if err != nil {
		return err
	}
	buf := make([]byte, chunk)
	for {
		n, err := io.ReadFull(body, buf)
		if n > 0 {
			if err := stream.Send(&pb.ReadFileStreamResponse{Message: &pb.ReadFileStreamResponse_Chunk{Chunk: buf[:n]}}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return s.fault(ctx, "read file", useError(use, err))
		}
	}
}
