package agent_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// TestSandbox does with one sandbox all that can be done with one.
func TestSandbox(t *testing.T) {
	h := newHost(t)
	r := request()
	sandbox := h.create(t, r)

	t.Run("same id", func(t *testing.T) {
		res, err := h.Create(t.Context(), connect.NewRequest(r))
		if err != nil || res.Msg.GetSandbox().GetSandboxId() != sandbox {
			t.Errorf("a repeated create: %v %v", res, err)
		}
		list, err := h.List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
		if err != nil || len(list.Msg.GetSandboxes()) != 1 {
			t.Errorf("%v %v", list, err)
		}
	})
	t.Run("exec", func(t *testing.T) { testExec(t, h, sandbox) })
	t.Run("stream", func(t *testing.T) { testStream(t, h, sandbox) })
	t.Run("files", func(t *testing.T) { testFiles(t, h, sandbox) })
	t.Run("big files", func(t *testing.T) { testBigFiles(t, h, sandbox) })
	t.Run("proxy", func(t *testing.T) { testProxy(t, h, sandbox) })
	t.Run("what it tells", func(t *testing.T) { testReports(t, h, sandbox) })
	t.Run("bad requests", func(t *testing.T) { testBadRequests(t, h, sandbox) })

	// What is under way ends with the sandbox.
	long := make(chan error)
	go func() {
		_, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: sh("touch /tmp/begun; sleep 600")}))
		long <- err
	}()
	await.Until(t, "the command begins", func() bool { return h.exec(t, sandbox, sh("test -e /tmp/begun"), nil).GetExitCode() == 0 })
	begin := time.Now()
	h.destroy(t, sandbox)
	if err := <-long; connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("a command whose sandbox was destroyed: %v", err)
	}
	t.Logf("destroyed in %v", time.Since(begin))
	h.gone(t, sandbox)
	h.destroy(t, sandbox)
}

func testExec(t *testing.T, h *host, sandbox string) {
	binary, _ := io.ReadAll(&pattern{n: 1 << 20})
	for name, test := range map[string]struct {
		cmd   *pb.Command
		stdin []byte
		want  *pb.ExecResponse
	}{
		"output":      {sh("echo out; echo err >&2; exit 7"), nil, &pb.ExecResponse{Stdout: []byte("out\n"), Stderr: []byte("err\n"), ExitCode: 7}},
		"binary":      {&pb.Command{Cmd: "cat"}, binary, &pb.ExecResponse{Stdout: binary}},
		"user":        {&pb.Command{Cmd: "id", Args: []string{"-un"}}, nil, &pb.ExecResponse{Stdout: []byte("user\n")}},
		"other user":  {&pb.Command{Cmd: "id", Args: []string{"-un"}, User: "root"}, nil, &pb.ExecResponse{Stdout: []byte("root\n")}},
		"folder":      {&pb.Command{Cmd: "pwd", Cwd: "/usr/share"}, nil, &pb.ExecResponse{Stdout: []byte("/usr/share\n")}},
		"home":        {&pb.Command{Cmd: "pwd"}, nil, &pb.ExecResponse{Stdout: []byte("/home/user\n")}},
		"environment": {&pb.Command{Cmd: "sh", Args: []string{"-c", "echo $FROM $OWN"}, Envs: map[string]string{"OWN": "it's mine"}}, nil, &pb.ExecResponse{Stdout: []byte("sandbox it's mine\n")}},
		"signal":      {sh("kill -9 $$"), nil, &pb.ExecResponse{ExitCode: 137, Error: "signal: killed"}},
		"python":      {&pb.Command{Cmd: "python3", Args: []string{"-"}}, []byte("print(6*7)"), &pb.ExecResponse{Stdout: []byte("42\n")}},
		"host name":   {&pb.Command{Cmd: "hostname"}, nil, &pb.ExecResponse{Stdout: []byte(sandbox + "\n")}},
	} {
		t.Run(name, func(t *testing.T) {
			got := h.exec(t, sandbox, test.cmd, test.stdin)
			if !bytes.Equal(got.GetStdout(), test.want.GetStdout()) || !bytes.Equal(got.GetStderr(), test.want.GetStderr()) ||
				got.GetExitCode() != test.want.GetExitCode() || got.GetError() != test.want.GetError() || got.GetTruncated() {
				t.Errorf("got %.300v", got)
			}
		})
	}
	kernel := h.exec(t, sandbox, &pb.Command{Cmd: "cat", Args: []string{"/proc/sys/kernel/random/boot_id"}}, nil)
	if string(kernel.GetStdout()) == read("/proc/sys/kernel/random/boot_id") {
		t.Error("the sandbox runs on the host's kernel")
	}

	t.Run("time-out", func(t *testing.T) {
		cmd := sh("setsid sleep 601 & sleep 601")
		cmd.TimeoutSeconds = 1
		if got := h.exec(t, sandbox, cmd, nil); !got.GetTimedOut() || got.GetError() == "" {
			t.Errorf("got %v", got)
		}
		if got := h.exec(t, sandbox, sh("pgrep -c -f 'sleep 60[1]' || ps ax | grep -c 'sleep 60[1]'"), nil); strings.TrimSpace(string(got.GetStdout())) != "0" && !strings.HasPrefix(string(got.GetStdout()), "0") {
			t.Errorf("what it started still runs: %q %q", got.GetStdout(), got.GetStderr())
		}
	})
	t.Run("too much output", func(t *testing.T) {
		got := h.exec(t, sandbox, sh("head -c 20000000 /dev/zero"), nil)
		if len(got.GetStdout()) != 16<<20 || !got.GetTruncated() {
			t.Errorf("%d bytes, truncated: %v", len(got.GetStdout()), got.GetTruncated())
		}
	})
	for name, test := range map[string]struct {
		cmd  *pb.Command
		want connect.Code
	}{
		"no such command": {&pb.Command{Cmd: "no-such-command"}, connect.CodeNotFound},
		"no such user":    {&pb.Command{Cmd: "true", User: "nobody-here"}, connect.CodeInvalidArgument},
		"no such folder":  {&pb.Command{Cmd: "true", Cwd: "/no/such"}, connect.CodeInvalidArgument},
	} {
		_, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: test.cmd}))
		if connect.CodeOf(err) != test.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// stream begins a command with its input and output streamed.
func (h *host) stream(t *testing.T, start *pb.ExecStreamRequest_Start) (*connect.BidiStreamForClient[pb.ExecStreamRequest, pb.ExecStreamResponse], context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), await.Hang)
	s := h.ExecStream(ctx)
	if err := s.Send(&pb.ExecStreamRequest{Message: &pb.ExecStreamRequest_Start_{Start: start}}); err != nil {
		t.Fatal(err)
	}
	m, err := s.Receive()
	if err != nil || m.GetStarted().GetPid() == 0 {
		t.Fatalf("started as %v, %v", m, err)
	}
	return s, func() {
		cancel()
		// The transport sees that the context ends when it does not wait for
		// more of the request.
		_ = s.CloseRequest()
	}
}

func stdin(data string) *pb.ExecStreamRequest {
	return &pb.ExecStreamRequest{Message: &pb.ExecStreamRequest_Stdin{Stdin: []byte(data)}}
}

func testStream(t *testing.T, h *host, sandbox string) {
	t.Run("input", func(t *testing.T) {
		s, cancel := h.stream(t, &pb.ExecStreamRequest_Start{SandboxId: sandbox, Command: sh("while read x; do echo got $x; done; echo end >&2; exit 3"), Stdin: true})
		defer cancel()
		for _, line := range []string{"one", "two"} {
			if err := s.Send(stdin(line + "\n")); err != nil {
				t.Fatal(err)
			}
			if m, err := s.Receive(); err != nil || string(m.GetStdout()) != "got "+line+"\n" {
				t.Fatalf("%v %v", m, err)
			}
		}
		if err := s.Send(&pb.ExecStreamRequest{Message: &pb.ExecStreamRequest_CloseStdin_{CloseStdin: &pb.ExecStreamRequest_CloseStdin{}}}); err != nil {
			t.Fatal(err)
		}
		if m, err := s.Receive(); err != nil || string(m.GetStderr()) != "end\n" {
			t.Fatalf("%v %v", m, err)
		}
		if m, err := s.Receive(); err != nil || m.GetExited().GetExitCode() != 3 {
			t.Fatalf("%v %v", m, err)
		}
		// The client's own end of the stream is still open.
		if _, err := s.Receive(); !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %v", err)
		}
	})
	t.Run("one connection", func(t *testing.T) {
		// The guest lists its daemon's connections, of which this command has one.
		peers := map[string]bool{}
		const runs = 8
		for range runs {
			ctx, cancel := context.WithTimeout(t.Context(), await.Hang)
			s, err := h.Run(ctx, connect.NewRequest(&pb.RunRequest{SandboxId: sandbox, Command: sh("ss -Htn state established '( sport = :49983 )'")}))
			if err != nil {
				t.Fatal(err)
			}
			var listed strings.Builder
			ended := false
			for !ended && s.Receive() {
				listed.Write(s.Msg().GetStdout())
				ended = s.Msg().GetExited() != nil
			}
			if !ended {
				t.Fatalf("the command has no end: %v", s.Err())
			}
			cancel() // At once, before the end of the stream.
			_ = s.Close()
			n := len(peers)
			for line := range strings.Lines(listed.String()) {
				peers[strings.Fields(line)[3]] = true
			}
			if n == 0 && len(peers) == 0 {
				t.Fatalf("the guest lists %q", listed.String())
			}
		}
		if len(peers) >= runs/2 { // Others than this test ask the guest too.
			t.Errorf("%d commands came over %d connections", runs, len(peers))
		}
	})
	t.Run("terminal", func(t *testing.T) {
		s, cancel := h.stream(t, &pb.ExecStreamRequest_Start{SandboxId: sandbox, Command: sh("stty size; read x; stty size; sleep 600"), Terminal: &pb.TerminalSize{Cols: 90, Rows: 30}})
		defer cancel()
		var seen strings.Builder
		await := func(text string) *pb.ExecStreamResponse {
			t.Helper()
			for {
				m, err := s.Receive()
				if err != nil {
					t.Fatalf("%v after %q, waiting for %q", err, seen.String(), text)
				}
				seen.Write(m.GetTerminal())
				if m.GetExited() != nil || text != "" && strings.Contains(seen.String(), text) {
					return m
				}
			}
		}
		await("30 90")
		for _, m := range []*pb.ExecStreamRequest{
			{Message: &pb.ExecStreamRequest_Resize{Resize: &pb.TerminalSize{Cols: 100, Rows: 40}}}, stdin("go\n"),
		} {
			if err := s.Send(m); err != nil {
				t.Fatal(err)
			}
		}
		await("40 100")
		if err := s.Send(&pb.ExecStreamRequest{Message: &pb.ExecStreamRequest_Signal{Signal: int32(syscall.SIGTERM)}}); err != nil {
			t.Fatal(err)
		}
		if m := await(""); !strings.Contains(m.GetExited().GetError(), "terminated") {
			t.Errorf("ended as %v", m)
		}
	})
	t.Run("client goes", func(t *testing.T) {
		_, cancel := h.stream(t, &pb.ExecStreamRequest_Start{SandboxId: sandbox, Command: sh("echo $$ > /tmp/left; exec sleep 602")})
		alive := func() bool {
			return h.exec(t, sandbox, sh("kill -0 $(cat /tmp/left)"), nil).GetExitCode() == 0
		}
		await.Until(t, "the command starts", alive)
		cancel()
		await.Until(t, "the command ends with its client", func() bool { return !alive() })
	})
	t.Run("much output to a slow client", func(t *testing.T) {
		s, cancel := h.stream(t, &pb.ExecStreamRequest_Start{SandboxId: sandbox, Command: sh("head -c 8000000 /dev/zero")})
		defer cancel()
		n := 0
		for {
			m, err := s.Receive()
			if err != nil {
				t.Fatal(err)
			}
			if n += len(m.GetStdout()); n < 1<<20 {
				time.Sleep(5 * time.Millisecond)
			}
			if m.GetExited() != nil {
				break
			}
		}
		if n != 8000000 {
			t.Errorf("%d bytes came", n)
		}
	})
}

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
				break // the answer says why
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

	// A tree goes out and in again.
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
		t.Errorf("an archive that leads out: %v", err)
	}
	// Refused although its content has not ended.
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
	// It could be truncated while it is read: no size is promised.
	if n := h.readStream(t, &pb.ReadFileStreamRequest{File: ref(sandbox, i.GetPath())}, got); n != -1 || !bytes.Equal(got.Sum(nil), want) {
		t.Errorf("what came back of %d bytes differs", n)
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

// peak is the most memory that a process ever had, in KiB.
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
	t.Fatal("no peak")
	return 0
}

// guestServer is a web server that echoes WebSocket messages at /ws.
const guestServer = `
import base64, hashlib, http.server, struct
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path == "/ws": return self.ws()
        if self.path.startswith("/big/"):
            n = int(self.path[5:])
            self.send_response(200); self.send_header("Content-Length", str(n)); self.end_headers()
            block = b"x" * (1 << 20)
            while n > 0:
                self.wfile.write(block[:n]); n -= len(block)
            return
        body = ("host=%s path=%s auth=%s" % (self.headers["Host"], self.path, self.headers["Authorization"])).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def ws(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket"); self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        while True:
            head = self.rfile.read(2)
            if len(head) < 2 or head[0] & 15 == 8: break
            n = head[1] & 127
            if n == 126: n = struct.unpack(">H", self.rfile.read(2))[0]
            mask = self.rfile.read(4)
            data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(n)))
            out = bytes([head[0]]) + (bytes([n]) if n < 126 else bytes([126]) + struct.pack(">H", n))
            self.wfile.write(out + data)
        self.close_connection = True
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8000), H).serve_forever()
`

func (h *host) url(sandbox string, port any, path string) string {
	return fmt.Sprintf("%s/proxy/%s/%v%s", h.Base, sandbox, port, path)
}

func (h *host) get(t *testing.T, url string, header http.Header) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if header != nil {
		req.Header = header
	}
	req.Host = "8000-sandbox.localhost:8000"
	resp, err := h.Plain.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func testProxy(t *testing.T, h *host, sandbox string) {
	if _, err := h.WriteFile(t.Context(), connect.NewRequest(&pb.WriteFileRequest{File: ref(sandbox, "/tmp/server.py"), Content: []byte(guestServer)})); err != nil {
		t.Fatal(err)
	}
	h.exec(t, sandbox, sh("setsid python3 /tmp/server.py >/tmp/server.log 2>&1 </dev/null &"), nil)
	if code, body := h.get(t, h.url(sandbox, 9, "/"), nil); code != 502 || !strings.Contains(body, `"bad_gateway"`) || !strings.Contains(body, "nothing listens on port 9") {
		t.Errorf("a port where nothing listens: %d %s", code, body)
	}
	// It listens on loopback alone; soon after, it is found there.
	var code int
	var body string
	await.Until(t, "the server appears", func() bool {
		code, body = h.get(t, h.url(sandbox, 8000, "/a//b%2fc?d=%41"), http.Header{"X-Wrenn-Authorization": {"Bearer own"}})
		return code == 200
	})
	if body != "host=8000-sandbox.localhost:8000 path=/a//b%2fc?d=%41 auth=Bearer own" {
		t.Errorf("the guest saw %s", body)
	}

	ctx := await.Context(t)
	ws, _, err := websocket.Dial(ctx, h.url(sandbox, 8000, "/ws"), &websocket.DialOptions{HTTPClient: h.Plain})
	if err != nil {
		t.Fatal(err)
	}
	for _, msg := range []string{"hello", strings.Repeat("long ", 2000)} {
		if err := ws.Write(ctx, websocket.MessageText, []byte(msg)); err != nil {
			t.Fatal(err)
		}
		if _, got, err := ws.Read(ctx); err != nil || string(got) != msg {
			t.Fatalf("echoed %.100q, %v", got, err)
		}
	}
	ws.CloseNow()

	before := peak(t, h.Cmd.Process.Pid)
	begin := time.Now()
	resp, err := h.Plain.Get(h.url(sandbox, 8000, "/big/"+strconv.Itoa(200<<20)))
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if err != nil || n != 200<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
	t.Logf("a download at %.0f MiB/s", float64(n)/(1<<20)/time.Since(begin).Seconds())
	if grown := peak(t, h.Cmd.Process.Pid) - before; grown > 32<<10 {
		t.Errorf("the agent grew by %d MiB for it", grown>>10)
	}

	for url, want := range map[string]int{
		h.url(sandbox, 0, "/"): 400, h.url(sandbox, 65536, "/"): 400, h.url(sandbox, "x", "/"): 400, h.url("cl-no", 80, "/"): 400,
		h.url(id.Format(id.Sandbox, uuid.New()), 80, "/"): 404,
		h.url(sandbox, 49983, "/init"):                    404, h.url(sandbox, 49983, "/%69nit"): 404, h.url(sandbox, 49983, "/freeze"): 404,
		h.url(sandbox, 49983, "/envs"): 401,
	} {
		if code, body := h.get(t, url, nil); code != want {
			t.Errorf("%s: %d %s, want %d", url, code, body, want)
		}
	}
	if code, body := h.get(t, h.url(sandbox, 49983, "/envs"), http.Header{"X-Access-Token": {"a-sandboxs-token"}}); code != 200 || !strings.Contains(body, `"FROM":"sandbox"`) {
		t.Errorf("with the sandbox's token: %d %s", code, body)
	}
}

func testReports(t *testing.T, h *host, sandbox string) {
	m, err := h.Metrics(t.Context(), connect.NewRequest(&pb.MetricsRequest{SandboxId: sandbox}))
	if err != nil {
		t.Fatal(err)
	}
	all, err := h.Samples(t.Context(), connect.NewRequest(&pb.SamplesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	sampled := false
	for _, r := range all.Msg.Samples {
		if r.SandboxId == sandbox {
			sampled = r.Vcpus == 1 && r.CpuUs > 0 && r.MemoryBytes > 50<<20 && r.DiskBytes > 0
		}
	}
	if !sampled {
		t.Errorf("samples: %v", all.Msg)
	}
	if r := m.Msg; r.GetCpuCount() != 1 || r.GetMemoryTotalBytes() < 150<<20 || r.GetMemoryTotalBytes() > 256<<20 || r.GetDiskTotalBytes() < 4<<30 || r.GetHostMemoryBytes() < 50<<20 {
		t.Errorf("metrics %v", r)
	}
	c, err := h.Console(t.Context(), connect.NewRequest(&pb.ConsoleRequest{SandboxId: sandbox}))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("console: %d bytes", len(c.Msg.GetOutput()))
	hi, err := h.Host(t.Context(), connect.NewRequest(&pb.HostRequest{}))
	if r := hi.Msg; err != nil || r.GetVersion() != "test" || r.GetVmm() != "qemu" || r.GetAccelerator() != vmmtest.Accelerator() || r.GetSandboxes() != 1 || r.GetCpus() < 1 ||
		r.GetMemoryFreeBytes() >= 8192<<20 || r.GetDiskFreeBytes() == 0 || r.GetDiskFreeBytes() > r.GetDiskBytes() {
		t.Errorf("host %v %v", r, err)
	}
	ts, err := h.Templates(t.Context(), connect.NewRequest(&pb.TemplatesRequest{}))
	if err != nil || len(ts.Msg.GetTemplates()) == 0 || ts.Msg.GetTemplates()[0].GetName() != "minimal" {
		t.Errorf("templates %v %v", ts, err)
	}
	code, body := h.get(t, h.Base+"/metrics", nil)
	for _, want := range []string{`wrenn_agent_sandboxes{state="running"} 1`, `wrenn_agent_step_seconds_count{operation="create",step="restore"} 1`, `wrenn_agent_operation_seconds_count{operation="create"} 1`, `wrenn_agent_slots{state="used"} `, `wrenn_agent_slots{state="stuck"} 0`, "wrenn_agent_warm_machines ", "wrenn_agent_memory_reserved_bytes", `wrenn_agent_proxy_requests_total{result="forwarded"}`} {
		if code != 200 || !strings.Contains(body, want) {
			t.Errorf("%d: the metrics lack %s", code, want)
		}
	}
}

func testBadRequests(t *testing.T, h *host, sandbox string) {
	bad := func(name string, want connect.Code, err error) {
		t.Helper()
		if connect.CodeOf(err) != want || err == nil {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	creates := map[string]struct {
		change func(*pb.CreateRequest)
		want   connect.Code
	}{
		"id":             {func(r *pb.CreateRequest) { r.SandboxId = "../../etc" }, connect.CodeInvalidArgument},
		"team":           {func(r *pb.CreateRequest) { r.TeamId = "" }, connect.CodeInvalidArgument},
		"template id":    {func(r *pb.CreateRequest) { r.TemplateId = "minimal" }, connect.CodeInvalidArgument},
		"no template":    {func(r *pb.CreateRequest) { r.TemplateId = id.Format(id.Template, uuid.New()) }, connect.CodeNotFound},
		"no cpu":         {func(r *pb.CreateRequest) { r.Vcpus = 0 }, connect.CodeInvalidArgument},
		"many cpus":      {func(r *pb.CreateRequest) { r.Vcpus = 33 }, connect.CodeInvalidArgument},
		"no memory":      {func(r *pb.CreateRequest) { r.MemoryMib = 0 }, connect.CodeInvalidArgument},
		"much memory":    {func(r *pb.CreateRequest) { r.MemoryMib = 16385 }, connect.CodeInvalidArgument},
		"host's memory":  {func(r *pb.CreateRequest) { r.MemoryMib = 8192 }, connect.CodeResourceExhausted},
		"negative disk":  {func(r *pb.CreateRequest) { r.DiskMib = -1 }, connect.CodeInvalidArgument},
		"small disk":     {func(r *pb.CreateRequest) { r.DiskMib = 100 }, connect.CodeInvalidArgument},
		"time-out":       {func(r *pb.CreateRequest) { r.TimeoutSeconds = -1 }, connect.CodeInvalidArgument},
		"no token":       {func(r *pb.CreateRequest) { r.AccessToken = "" }, connect.CodeInvalidArgument},
		"header's token": {func(r *pb.CreateRequest) { r.AccessToken = "a\r\nb" }, connect.CodeInvalidArgument},
		"environment":    {func(r *pb.CreateRequest) { r.Envs = map[string]string{"A=B": "c"} }, connect.CodeInvalidArgument},
		"NUL":            {func(r *pb.CreateRequest) { r.Envs = map[string]string{"A": "c\x00"} }, connect.CodeInvalidArgument},
		"another's id":   {func(r *pb.CreateRequest) { r.SandboxId = sandbox }, connect.CodeAlreadyExists},
	}
	for name, test := range creates {
		r := request()
		test.change(r)
		_, err := h.Create(t.Context(), connect.NewRequest(r))
		bad("create: "+name, test.want, err)
	}
	for name, c := range map[string]*pb.Command{
		"nothing": {}, "NUL": {Cmd: "a\x00b"}, "NUL argument": {Cmd: "a", Args: []string{"\x00"}}, "user": {Cmd: "a", User: "root:x"}, "folder": {Cmd: "a", Cwd: "/\x00"}, "time-out": {Cmd: "a", TimeoutSeconds: -1}, "environment": {Cmd: "a", Envs: map[string]string{"": "x"}},
	} {
		_, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: c}))
		bad("exec: "+name, connect.CodeInvalidArgument, err)
	}
	for _, path := range []string{"", "a\x00b", "../etc/passwd", "/home/user/../../etc/passwd", strings.Repeat("x", 5000)} {
		_, err := h.ReadFile(t.Context(), connect.NewRequest(&pb.ReadFileRequest{File: ref(sandbox, path)}))
		bad(fmt.Sprintf("read %.20q", path), connect.CodeInvalidArgument, err)
		_, err = h.writeStream(t.Context(), &pb.WriteFileStreamRequest_Start{File: ref(sandbox, path)}, &pattern{n: 10})
		bad(fmt.Sprintf("write %.20q", path), connect.CodeInvalidArgument, err)
	}
	unknown := id.Format(id.Sandbox, uuid.New())
	_, err := h.Ping(t.Context(), connect.NewRequest(&pb.PingRequest{SandboxId: unknown}))
	bad("ping", connect.CodeNotFound, err)
	_, err = h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: unknown, Command: sh("true")}))
	bad("exec", connect.CodeNotFound, err)
	_, err = h.WriteFile(t.Context(), connect.NewRequest(&pb.WriteFileRequest{File: ref(sandbox, "x"), Content: make([]byte, 41<<20)}))
	bad("a message too big", connect.CodeResourceExhausted, err)

	// Without the token, or with another, there is nothing to be had.
	for _, wrong := range []string{"", "Bearer ", "Bearer wrong", "Bearer " + token + "x", "Basic " + token} {
		c := hostagentv1connect.NewHostAgentClient(&http.Client{Transport: headers{h.HTTP.Transport, wrong}}, h.Base)
		_, err := c.List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
		bad("token "+wrong, connect.CodeUnauthenticated, err)
		for _, path := range []string{"/metrics", "/proxy/" + sandbox + "/8000/"} {
			resp, err := (&http.Client{Transport: headers{h.HTTP.Transport, wrong}}).Get(h.Base + path)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusUnauthorized {
				t.Errorf("%s with %q: %s", path, wrong, resp.Status)
			}
		}
	}
}

type headers struct {
	next  http.RoundTripper
	token string
}

func (x headers) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	if x.token != "" {
		r.Header.Set("Authorization", x.token)
	}
	return x.next.RoundTrip(r)
}

func TestExpiryAndUse(t *testing.T) {
	h := newHost(t)
	r := request()
	r.TimeoutSeconds = 6
	sandbox := h.create(t, r)
	// Use and pings keep it.
	if got := h.exec(t, sandbox, sh("sleep 8; echo done"), nil); string(got.GetStdout()) != "done\n" {
		t.Fatalf("%v", got)
	}
	begun := time.Now()
	p, err := h.Ping(t.Context(), connect.NewRequest(&pb.PingRequest{SandboxId: sandbox}))
	if err != nil {
		t.Fatal(err)
	}
	if at := p.Msg.GetSandbox().GetExpiresAt().AsTime(); at.Before(begun.Add(6*time.Second)) || at.After(time.Now().Add(6*time.Second)) {
		t.Errorf("after a ping at %v it expires at %v", begun, at)
	}
	// So does a connection through the proxy that does nothing.
	conn, err := net.Dial("unix", h.Dir.AgentSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	h.exec(t, sandbox, sh("setsid python3 -c 'import socket;s=socket.create_server((\"0.0.0.0\",7000));c=s.accept();import time;time.sleep(600)' >/dev/null 2>&1 </dev/null &"), nil)
	h.exec(t, sandbox, sh("for i in $(seq 100); do ss -ltn | grep -q :7000 && exit; sleep 0.1; done"), nil)
	fmt.Fprintf(conn, "GET /proxy/%s/7000/ HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", sandbox, token)
	time.Sleep(8 * time.Second)
	if _, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: sandbox})); err != nil {
		t.Fatalf("it expired with a connection in flight: %v", err)
	}
	conn.Close()
	if e := h.event(t, sandbox); e.GetKind() != pb.Event_KIND_EXPIRED || !strings.Contains(e.GetReason(), "6s") {
		t.Errorf("event %v", e)
	}
	h.awaitGone(t, sandbox)
	h.gone(t, sandbox)
}

// awaitGone waits until the agent does not know a sandbox any more.
func (h *host) awaitGone(t *testing.T, sandbox string) {
	t.Helper()
	await.Until(t, "the agent does not know the sandbox", func() bool {
		_, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: sandbox}))
		return connect.CodeOf(err) == connect.CodeNotFound
	})
}

func TestMachineIsKilled(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, request())
	if err := syscall.Kill(agenttest.QEMU(sandbox), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.loses(t, sandbox, "killed") // [TestReboot] has what becomes of it
	h.destroy(t, sandbox)
	h.gone(t, sandbox)
}

// TestFailedCreates: whatever breaks while a sandbox is made, nothing is left,
// and the error says why, at once.
func TestFailedCreates(t *testing.T) {
	h := newHost(t)
	// While it boots, its machine is there and it is not.
	booting := func(r *pb.CreateRequest) (pid int, created chan error) {
		created = make(chan error, 1)
		go func() {
			_, err := h.Create(t.Context(), connect.NewRequest(r))
			created <- err
		}()
		await.Until(t, "a machine starts", func() bool {
			pid = agenttest.QEMU(r.SandboxId)
			return pid != 0
		})
		return pid, created
	}
	// A machine may come up before anything is done to it. Then there is another.
	early := func(t *testing.T, try func() bool) {
		t.Helper()
		await.Until(t, "it is done while a sandbox starts", try)
	}
	t.Run("the machine is killed", func(t *testing.T) {
		early(t, func() bool {
			r := request()
			pid, created := booting(r)
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			err := <-created
			if err == nil {
				h.awaitGone(t, r.SandboxId)
				return false
			}
			if connect.CodeOf(err) != connect.CodeUnavailable {
				t.Error(err)
			}
			t.Log(err)
			h.gone(t, r.SandboxId)
			return true
		})
	})
	t.Run("it is destroyed", func(t *testing.T) {
		early(t, func() bool {
			r := request()
			_, created := booting(r)
			h.destroy(t, r.SandboxId)
			err := <-created
			if err != nil && (connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "destroyed")) {
				t.Errorf("create ended with %v", err)
			}
			h.gone(t, r.SandboxId)
			return err != nil
		})
	})
	t.Run("the caller goes", func(t *testing.T) {
		early(t, func() bool {
			r := request()
			ctx, cancel := context.WithCancel(t.Context())
			created := make(chan error, 1)
			go func() {
				_, err := h.Create(ctx, connect.NewRequest(r))
				created <- err
			}()
			await.Until(t, "a machine starts", func() bool { return agenttest.QEMU(r.SandboxId) != 0 })
			cancel()
			err := <-created
			if err == nil {
				h.destroy(t, r.SandboxId)
				return false
			}
			h.awaitGone(t, r.SandboxId)
			h.gone(t, r.SandboxId)
			return true
		})
	})
	t.Run("the tap is gone", func(t *testing.T) {
		// The slots that are ready lose their taps.
		names, err := filepath.Glob("/run/wrenn/netns/wrenn-ns-*")
		if err != nil || len(names) == 0 {
			t.Fatal(names, err)
		}
		for _, n := range names {
			if out, err := exec.Command("nsenter", "--net="+n, "ip", "link", "del", "tap0").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		r := request()
		_, err = h.Create(t.Context(), connect.NewRequest(r))
		if err == nil {
			t.Fatal("created without a network")
		}
		t.Log(err)
		h.gone(t, r.SandboxId)
		// The broken slots are used up, one a failure; then all is well again.
		for range len(names) + 1 {
			r := request()
			if _, err = h.Create(t.Context(), connect.NewRequest(r)); err == nil {
				h.destroy(t, r.SandboxId)
				break
			}
		}
		if err != nil {
			t.Errorf("it does not recover: %v", err)
		}
	})
}

func TestAgentRestarts(t *testing.T) {
	h := newHost(t)
	r := request()
	r.TimeoutSeconds = 3600
	kept := h.create(t, r)
	lost := h.create(t, request())
	h.exec(t, kept, sh("echo remembered > note"), nil)
	pid := agenttest.QEMU(kept)

	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		h.Kill(t, sig)
		if agenttest.QEMU(kept) != pid {
			t.Fatal("the machine did not outlive its agent")
		}
		if sig == syscall.SIGKILL {
			if err := syscall.Kill(agenttest.QEMU(lost), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		h.Start(t)
		if got := h.exec(t, kept, &pb.Command{Cmd: "cat", Args: []string{"note"}}, nil); string(got.GetStdout()) != "remembered\n" || agenttest.QEMU(kept) != pid {
			t.Errorf("after %v: %v", sig, got)
		}
		g, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: kept}))
		if err != nil || g.Msg.GetSandbox().GetTeamId() != r.TeamId || g.Msg.GetSandbox().GetExpiresAt() == nil {
			t.Errorf("taken back as %v, %v", g, err)
		}
		if sig == syscall.SIGKILL {
			h.loses(t, lost, "killed")
			h.destroy(t, lost)
			h.gone(t, lost)
		}
	}

	// Killed in the middle of a create: the next agent removes the half.
	await.Until(t, "the agent is killed while it creates a sandbox", func() bool {
		half := request()
		go func() { _, _ = h.Create(context.Background(), connect.NewRequest(half)) }()
		await.Until(t, "a machine starts", func() bool { return agenttest.QEMU(half.SandboxId) != 0 })
		h.Kill(t, syscall.SIGKILL)
		h.Start(t)
		got, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: half.SandboxId}))
		if err == nil && got.Msg.GetSandbox().GetState() == pb.SandboxState_SANDBOX_STATE_RUNNING {
			h.destroy(t, half.SandboxId) // It was whole already.
			return false
		}
		h.awaitGone(t, half.SandboxId)
		h.gone(t, half.SandboxId)
		return true
	})
	// A second agent on the same data is refused.
	second := exec.Command("/proc/self/exe")
	second.Env = h.Cmd.Env
	if out, err := second.CombinedOutput(); err == nil || !strings.Contains(string(out), "another host agent") {
		t.Errorf("a second agent: %v %s", err, out)
	}
	if got := h.exec(t, kept, sh("echo still"), nil); string(got.GetStdout()) != "still\n" {
		t.Errorf("%v", got)
	}
}

// TestSlowMachine has an agent start while a machine does not answer it, and while
// the record of another names a slot that there is not: both go on.
func TestSlowMachine(t *testing.T) {
	h := newHost(t)
	slow, damaged, other := h.create(t, request()), h.create(t, request()), h.create(t, request())
	h.exec(t, slow, sh("echo remembered > note"), nil)
	pid, pidDamaged := agenttest.QEMU(slow), agenttest.QEMU(damaged)
	signal := func(sig syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	state := func(sandbox string) pb.SandboxState {
		t.Helper()
		g, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: sandbox}))
		if err != nil {
			t.Fatal(err)
		}
		return g.Msg.GetSandbox().GetState()
	}
	problems := func() map[string]string {
		t.Helper()
		d, err := h.Host(t.Context(), connect.NewRequest(&pb.HostRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]string{}
		for _, p := range d.Msg.GetProblems() {
			all[p.GetObject()] = p.GetKind() + ": " + p.GetMessage()
		}
		return all
	}
	h.Kill(t, syscall.SIGKILL)
	signal(syscall.SIGSTOP)
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
	records, err := filepath.Glob(filepath.Join(h.Dir.Sandboxes(), "*", "sandbox.json"))
	if err != nil {
		t.Fatal(err)
	}
	var record, was, wrong string
	for _, path := range records {
		text := read(path)
		if i := strings.Index(text, `"slot": `); strings.Contains(text, fmt.Sprintf(`"pid": %d,`, pidDamaged)) && i >= 0 {
			record, was = path, text
			wrong = text[:i] + `"slot": 99999` + text[i+len(`"slot": `):]
		}
	}
	if record == "" {
		t.Fatalf("no record of the machine %d", pidDamaged)
	}
	if err := os.WriteFile(record, []byte(wrong), 0o600); err != nil {
		t.Fatal(err)
	}
	h.Start(t)
	for _, sandbox := range []string{slow, damaged} {
		if got := state(sandbox); got != pb.SandboxState_SANDBOX_STATE_RESUMING {
			t.Errorf("a sandbox that is set aside is %v", got)
		}
		if p := problems()[sandbox]; !strings.HasPrefix(p, "sandbox: ") {
			t.Errorf("the problem is %q", p)
		}
	}
	if got := h.exec(t, other, sh("echo works"), nil); string(got.GetStdout()) != "works\n" {
		t.Errorf("another sandbox: %v", got)
	}
	signal(syscall.SIGCONT)
	await.Until(t, "the machine is taken back", func() bool { return state(slow) == pb.SandboxState_SANDBOX_STATE_RUNNING })
	if got := h.exec(t, slow, sh("cat note"), nil); string(got.GetStdout()) != "remembered\n" || agenttest.QEMU(slow) != pid {
		t.Errorf("after it was taken back: %v", got)
	}
	if p := problems(); p[slow] != "" || p[damaged] == "" || len(p) != 1 {
		t.Errorf("the problems are %v", p)
	}

	// The record is repaired.
	h.Kill(t, syscall.SIGTERM)
	if err := os.WriteFile(record, []byte(was), 0o600); err != nil {
		t.Fatal(err)
	}
	h.Start(t)
	await.Until(t, "the machine is taken back", func() bool { return state(damaged) == pb.SandboxState_SANDBOX_STATE_RUNNING })
	if got := h.exec(t, damaged, sh("echo works"), nil); string(got.GetStdout()) != "works\n" || agenttest.QEMU(damaged) != pidDamaged {
		t.Errorf("after its record was repaired: %v", got)
	}
	if p := problems(); len(p) != 0 {
		t.Errorf("the problems are %v", p)
	}
}

func TestTwentyAtOnce(t *testing.T) {
	h := newHost(t)
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range 20 {
		wg.Go(func() {
			r := request()
			if _, err := h.Create(t.Context(), connect.NewRequest(r)); err != nil {
				t.Errorf("create %d: %v", i, err)
				return
			}
			res, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: r.SandboxId, Command: sh("echo $((6*7))")}))
			if err != nil || string(res.Msg.GetStdout()) != "42\n" {
				t.Errorf("exec %d: %v %v", i, res, err)
			}
		})
	}
	wg.Wait()
	t.Logf("20 created in %v", time.Since(begin))
	list, err := h.List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
	if err != nil || len(list.Msg.GetSandboxes()) != 20 {
		t.Fatalf("%d sandboxes, %v", len(list.Msg.GetSandboxes()), err)
	}
	begin = time.Now()
	for i, s := range list.Msg.GetSandboxes() {
		if i%2 == 0 { // the others end with the agent
			wg.Go(func() { h.destroy(t, s.GetSandboxId()) })
		}
	}
	wg.Wait()
	t.Logf("10 destroyed in %v", time.Since(begin))
	h.Finish(t)
	if _, err := os.Stat(h.Dir.AgentSocket()); err == nil {
		t.Error("the socket is left")
	}
}
