package agent_test

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

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
	// It listens on loopback only; the guest daemon soon forwards the port.
	var code int
	var body string
	await.Until(t, "the server responds", func() bool {
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
