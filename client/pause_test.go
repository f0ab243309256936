package client

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
)

// service sends its canned responses in order, and records the requests.
type service struct {
	answers []string // "503" is an error
	asked   []string
	keys    []string // the requests' idempotency keys
}

func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	s.asked = append(s.asked, r.Method+" "+r.URL.EscapedPath()+" "+string(b))
	s.keys = append(s.keys, r.Header.Get("Idempotency-Key"))
	answer := s.answers[0]
	s.answers = s.answers[1:]
	if answer == "503" {
		w.WriteHeader(http.StatusServiceUnavailable)
		answer = `{"error":{"code":"unavailable","message":"the server is stopping"}}`
	}
	io.WriteString(w, answer)
}

// TestPauseForkSnapshot checks what each call sends, and which calls the client retries when the
// service is unavailable.
func TestPauseForkSnapshot(t *testing.T) {
	const box = `{"id":"cl-1","state":"paused","on_timeout":"pause","auto_resume":true,"paused_at":"2026-01-02T03:04:05Z","forked_from":"cl-0"}`
	const snap = `{"id":"tpl-1","name":"a","vcpus":2,"memory_mib":256,"disk_mib":5120,"sandbox_id":"cl-1"}`
	check := func(ok bool, err error) error {
		if err == nil && !ok {
			t.Error("the response was misread")
		}
		return err
	}
	for name, c := range map[string]struct {
		call       func(*Client) error
		request    string
		answer     string
		repeatable bool
	}{
		"pause": {func(c *Client) error {
			s, err := c.Pause(t.Context(), "cl-1")
			return check(err == nil && s.State == "paused" && s.PausedAt.Year() == 2026 && s.OnTimeout == PauseOnTimeout && s.AutoResume && s.ForkedFrom == "cl-0", err)
		}, "POST /v1/sandboxes/cl-1/pause ", box, true},
		"resume": {func(c *Client) error {
			s, err := c.Resume(t.Context(), "cl-1")
			return check(err == nil && s.ID == "cl-1", err)
		}, "POST /v1/sandboxes/cl-1/resume ", box, true},
		"fork": {func(c *Client) error {
			made, err := c.Fork(t.Context(), "cl-1", 2)
			return check(len(made) == 1 && made[0].ID == "cl-1", err)
		}, `POST /v1/sandboxes/cl-1/fork {"count":2}`, `{"sandboxes":[` + box + `]}`, true},
		"snapshot": {func(c *Client) error {
			s, err := c.Snapshot(t.Context(), "cl-1", "a")
			return check(err == nil && s.Name == "a" && s.VCPUs == 2 && s.MemoryMiB == 256 && s.DiskMiB == 5120 && s.SandboxID == "cl-1", err)
		}, `POST /v1/snapshots {"sandbox_id":"cl-1","name":"a"}`, snap, true},
		"delete": {func(c *Client) error { return c.DeleteSnapshot(t.Context(), "../a b") }, "DELETE /v1/snapshots/..%2Fa%20b ", "", true},
		"list": {func(c *Client) error {
			for s, err := range c.Snapshots(t.Context()) {
				if err := check(s.Name == "a", err); err != nil {
					return err
				}
			}
			return nil
		}, "GET /v1/snapshots ", `{"snapshots":[` + snap + `]}`, true},
		"exec": {func(c *Client) error {
			_, err := c.Exec(t.Context(), "cl-1", Command{Cmd: "true"}, nil)
			return err
		}, `POST /v1/sandboxes/cl-1/exec {"cmd":"true"}`, "{}", false},
		"exec, repeatable": {func(c *Client) error {
			_, err := c.Exec(t.Context(), "cl-1", Command{Cmd: "true", Repeatable: true}, nil)
			return err
		}, `POST /v1/sandboxes/cl-1/exec {"cmd":"true"}`, "{}", true},
		"create": {func(c *Client) error {
			_, err := c.Create(t.Context(), CreateOptions{OnTimeout: PauseOnTimeout, AutoResume: new(bool)})
			return err
		}, `POST /v1/sandboxes {"on_timeout":"pause","auto_resume":false}`, box, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := &service{answers: []string{"503", c.answer}}
			server := httptest.NewServer(s)
			defer server.Close()
			client, err := New(server.URL, "key")
			if err != nil {
				t.Fatal(err)
			}
			want := []string{c.request, c.request}
			err = c.call(client)
			if !c.repeatable {
				if err == nil {
					t.Error("the client retried")
				}
				err = c.call(client)
			}
			if err != nil || !slices.Equal(s.asked, want) {
				t.Errorf("requests %q, want %q: %v", s.asked, want, err)
			}
			// A retry is the same request; a second call is a new one.
			if makes := slices.Contains([]string{"fork", "snapshot", "create"}, name); makes {
				s.answers = []string{c.answer}
				if err := c.call(client); err != nil || len(s.keys) != 3 || s.keys[0] == "" || s.keys[1] != s.keys[0] || s.keys[2] == s.keys[0] {
					t.Errorf("under the keys %q: %v", s.keys, err)
				}
			}
		})
	}
}

// TestCreateSaysNothingElse checks that the client leaves out unset fields, so that the
// service chooses the defaults.
func TestCreateSaysNothingElse(t *testing.T) {
	if b, err := json.Marshal(CreateOptions{}); err != nil || string(b) != "{}" {
		t.Errorf("%s, %v", b, err)
	}
}
