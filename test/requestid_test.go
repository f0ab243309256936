package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/client"
)

// showsID is a server in a guest that responds with the request id that it gets.
const showsID = `from http.server import *
class H(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.headers["X-Request-Id"].encode())
HTTPServer(("", 8000), H).serve_forever()
`

// checkRequestIDs sends requests with ids through the front door: a command, a file, the
// guest daemon's port, and a program's port. It finds each id, marked as external, in the
// response, in the logs of server and agent, and in the guest daemon's log on the console
// of the sandbox. The programs must log at debug level.
func checkRequestIDs(t *testing.T, i *installation, box *client.Sandbox) {
	c := i.client(t)
	if _, err := c.WriteFile(t.Context(), box.ID, "/home/user/showsid.py", "", strings.NewReader(showsID)); err != nil {
		t.Fatal(err)
	}
	serve(t, c, box.ID, "python3 /home/user/showsid.py")

	logs := func(name string) func() (string, error) {
		return func() (string, error) {
			files, err := filepath.Glob(filepath.Join(i.dir, "logs", name))
			if err != nil || len(files) == 0 {
				return "", fmt.Errorf("log %s: %v, %v", name, files, err)
			}
			var all strings.Builder
			for _, f := range files {
				b, err := os.ReadFile(f)
				if err != nil {
					return "", err
				}
				all.Write(b)
			}
			return all.String(), nil
		}
	}
	console := func() (string, error) {
		b, err := c.Logs(t.Context(), box.ID)
		return string(b), err
	}
	port := func(p int) string { return fmt.Sprintf("%d-%s.localhost", p, box.ID) }
	for _, tt := range []struct {
		id, method, host, path, body string
		// server, agent and guest are a part of the line that each program logs; guest is
		// empty if the request does not reach the guest daemon.
		server, agent, guest string
		want                 string // of the response; empty: anything
	}{
		{
			"command", http.MethodPost, i.listen, "/v1/sandboxes/" + box.ID + "/exec", `{"cmd":"true"}`,
			"route=/v1/sandboxes/{sandbox_id}/exec status=200", "procedure=", "method=POST path=/process.Process/Start", "",
		},
		{
			"file", http.MethodGet, i.listen, "/v1/sandboxes/" + box.ID + "/files?path=/home/user/showsid.py", "",
			"route=/v1/sandboxes/{sandbox_id}/files status=200", "procedure=", "method=GET path=/files", showsID,
		},
		{"daemon", http.MethodGet, port(49983), "/envs", "", "port=49983 status=200", "port=49983 status=200", "method=GET path=/envs", ""},
		// The program gets what the client sent.
		{"program", http.MethodGet, port(8000), "/", "", "port=8000 status=200", "port=8000 status=200", "", "program"},
	} {
		header := http.Header{
			"X-Api-Key": {i.creds.APIKey}, "X-Access-Token": {box.AccessToken}, "X-Request-Id": {tt.id}, "Content-Type": {"application/json"},
		}
		eventually(t, func() error { // The agent waits only a while for the program's server.
			resp := i.request(t, tt.method, tt.host, tt.path, header, strings.NewReader(tt.body))
			body, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != http.StatusOK {
				return fmt.Errorf("%s: %s %s, %v", tt.id, resp.Status, body, err)
			}
			if got := resp.Header.Values("X-Request-Id"); len(got) != 1 || got[0] != "ext-"+tt.id {
				t.Errorf("%s: the response has the ids %q", tt.id, got)
			}
			if tt.want != "" && string(body) != tt.want {
				t.Errorf("%s: the response is %q", tt.id, body)
			}
			return nil
		})
		for _, log := range []struct {
			program, part string
			read          func() (string, error)
		}{{"server", tt.server, logs("*server*")}, {"agent", tt.agent, logs("*agent*")}, {"guest daemon", tt.guest, console}} {
			if log.part == "" {
				continue
			}
			// A line can arrive after the response.
			eventually(t, func() error {
				text, err := log.read()
				if err != nil {
					return err
				}
				for line := range strings.Lines(text) {
					if strings.Contains(line, " request_id=ext-"+tt.id+" ") && strings.Contains(line, log.part) {
						return nil
					}
				}
				return fmt.Errorf("%s: no line of the %s has %q", tt.id, log.program, log.part)
			})
		}
	}
}
