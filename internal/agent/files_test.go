package agent_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

func ref(sandbox, path string) *pb.FileRef { return &pb.FileRef{SandboxId: sandbox, Path: path} }

func (h *host) readStream(t *testing.T, r *pb.ReadFileStreamRequest, to io.Writer) int64 {
	t.Helper()
	s, err := h.ReadFileStream(t.Context(), connect.NewRequest(r))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	size := int64(-2)
	for s.Receive() {
		if size == -2 {
			size = s.Msg().GetStart().GetSize()
		}
		if _, err := to.Write(s.Msg().GetChunk()); err != nil {
			t.Fatal(err)
		}
	}
	if s.Err() != nil {
		t.Fatal(s.Err())
	}
	return size
}

func (h *host) writeStream(ctx context.Context, start *pb.WriteFileStreamRequest_Start, from io.Reader) (*pb.FileInfo, error) {
	s := h.WriteFileStream(ctx)
	err := s.Send(&pb.WriteFileStreamRequest{Message: &pb.WriteFileStreamRequest_Start_{Start: start}})
	buf := make([]byte, 256<<10)
	for err == nil {
		var n int
		if n, err = from.Read(buf); n > 0 {
			if s.Send(&pb.WriteFileStreamRequest{Message: &pb.WriteFileStreamRequest_Chunk{Chunk: buf[:n]}}) != nil {
				break // the response says why
			}
		}
	}
	res, err := s.CloseAndReceive()
	if err != nil {
		return nil, err
	}
	return res.Msg.GetFile(), nil
}

func testFiles(t *testing.T, h *host, sandbox string) {
	content, _ := io.ReadAll(&pattern{n: 100_000})
	w, err := h.WriteFile(t.Context(), connect.NewRequest(&pb.WriteFileRequest{File: ref(sandbox, "folder/file"), Content: content}))
	if err != nil {
		t.Fatal(err)
	}
	if i := w.Msg.GetFile(); i.GetPath() != "/home/user/folder/file" || i.GetName() != "file" || i.GetSize() != 100_000 {
		t.Errorf("wrote %v", i)
	}
	r, err := h.ReadFile(t.Context(), connect.NewRequest(&pb.ReadFileRequest{File: ref(sandbox, "/home/user/folder/file")}))
	if err != nil || !bytes.Equal(r.Msg.GetContent(), content) {
		t.Errorf("read %d bytes, %v", len(r.Msg.GetContent()), err)
	}
	if got := h.exec(t, sandbox, sh("stat -c %U folder/file"), nil); string(got.GetStdout()) != "user\n" {
		t.Errorf("the file is %q's", got.GetStdout())
	}
	var part bytes.Buffer
	if size := h.readStream(t, &pb.ReadFileStreamRequest{File: ref(sandbox, "folder/file"), Offset: 500, Length: 1000}, &part); size != 100_000 || !bytes.Equal(part.Bytes(), content[500:1500]) {
		t.Errorf("a part of %d bytes of %d", part.Len(), size)
	}
	_, err = h.ReadFile(t.Context(), connect.NewRequest(&pb.ReadFileRequest{File: &pb.FileRef{SandboxId: sandbox, Path: "/etc/shadow", User: "user"}}))
	if connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("a secret file: %v", err)
	}

	// Download a tree and upload it again.
	var packed bytes.Buffer
	h.exec(t, sandbox, sh("mkdir -p folder/sub && ln -s ../file folder/sub/link && chmod 750 folder/sub"), nil)
	if size := h.readStream(t, &pb.ReadFileStreamRequest{File: ref(sandbox, "folder"), Archive: true}, &packed); size != -1 {
		t.Errorf("an archive of %d bytes", size)
	}
	if _, err := h.writeStream(t.Context(), &pb.WriteFileStreamRequest_Start{File: ref(sandbox, "/tmp/copy"), Archive: true}, bytes.NewReader(packed.Bytes())); err != nil {
		t.Fatal(err)
	}
	if got := h.exec(t, sandbox, sh("cmp folder/file /tmp/copy/folder/sub/link && stat -c %a /tmp/copy/folder/sub"), nil); string(got.GetStdout()) != "750\n" {
		t.Errorf("the copy: %v", got)
	}
	var evil bytes.Buffer
	tw := tar.NewWriter(&evil)
	_ = tw.WriteHeader(&tar.Header{Name: "../../escaped", Mode: 0o644, Size: 1, Typeflag: tar.TypeReg})
	_, _ = tw.Write([]byte("x"))
	_ = tw.Close()
	if _, err := h.writeStream(t.Context(), &pb.WriteFileStreamRequest_Start{File: ref(sandbox, "/tmp/copy"), Archive: true}, &evil); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("an archive with a path outside its folder: %v", err)
	}
	// The agent refuses it before the content ends.
	if _, err := h.writeStream(t.Context(), &pb.WriteFileStreamRequest_Start{File: ref(sandbox, "/proc/nope")}, &pattern{n: 4 << 20}); err == nil {
		t.Error("wrote into /proc")
	}
}

func testBigFiles(t *testing.T, h *host, sandbox string) {
	const size = 160 << 20
	sum := func(hash hash.Hash, r io.Reader) []byte {
		if _, err := io.Copy(hash, r); err != nil {
			t.Fatal(err)
		}
		return hash.Sum(nil)
	}
	want := sum(sha256.New(), &pattern{n: size})
	before := peak(t, h.Cmd.Process.Pid)
	begin := time.Now()
	i, err := h.writeStream(t.Context(), &pb.WriteFileStreamRequest_Start{File: ref(sandbox, "/var/tmp/big"), Archive: false}, &pattern{n: size})
	if connect.CodeOf(err) == connect.CodePermissionDenied {
		i, err = h.writeStream(t.Context(), &pb.WriteFileStreamRequest_Start{File: ref(sandbox, "big")}, &pattern{n: size})
	}
	if err != nil || i.GetSize() != size {
		t.Fatal(i, err)
	}
	t.Logf("%d MiB in at %.0f MiB/s", size>>20, size/(1<<20)/time.Since(begin).Seconds())
	begin = time.Now()
	got := sha256.New()
	// The file could shrink during the read, so the agent promises no size.
	if n := h.readStream(t, &pb.ReadFileStreamRequest{File: ref(sandbox, i.GetPath())}, got); n != -1 || !bytes.Equal(got.Sum(nil), want) {
		t.Errorf("the %d bytes read differ from those written", n)
	}
	t.Logf("%d MiB out at %.0f MiB/s", size>>20, size/(1<<20)/time.Since(begin).Seconds())
	if grown := peak(t, h.Cmd.Process.Pid) - before; grown > 48<<10 {
		t.Errorf("the agent grew by %d MiB for it", grown>>10)
	}
	if _, err := h.ReadFile(t.Context(), connect.NewRequest(&pb.ReadFileRequest{File: ref(sandbox, i.GetPath())})); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("a file too big to read at once: %v", err)
	}
	h.exec(t, sandbox, &pb.Command{Cmd: "rm", Args: []string{i.GetPath()}}, nil)
}

// peak returns the highest memory use of a process so far, in KiB.
func peak(t *testing.T, pid int) int {
	t.Helper()
	for line := range strings.Lines(read(fmt.Sprintf("/proc/%d/status", pid))) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("no VmHWM")
	return 0
}
