package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/await"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// ImportTemplate knows the image "there", which needs a password, and accepts any
// archive.
func (a *agent) ImportTemplate(ctx context.Context, stream *connect.ClientStream[hostagentv1.ImportTemplateRequest]) (*connect.Response[hostagentv1.ImportTemplateResponse], error) {
	if !stream.Receive() {
		return nil, stream.Err()
	}
	start := stream.Msg().GetStart()
	var archive bytes.Buffer
	for stream.Receive() {
		archive.Write(stream.Msg().GetChunk())
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	if err := a.decide(ctx, "import"); err != nil {
		return nil, err
	}
	size := int64(archive.Len())
	if r := start.GetRegistry(); r != nil {
		switch {
		case r.GetReference() != "registry.example/there:1" && !strings.HasPrefix(r.GetReference(), "registry.example/there@sha256:"):
			return nil, connect.NewError(connect.CodeNotFound, errors.New("the registry does not have this image"))
		case r.GetUsername() != "reader" || r.GetPassword() != "s3cret":
			return nil, connect.NewError(connect.CodePermissionDenied, errors.New("the registry denies access with these credentials"))
		}
		size = 1
	} else if size == 0 {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the archive is empty"))
	}
	t := &hostagentv1.Template{TemplateId: start.TemplateId, TeamId: start.TeamId, Name: start.Name, SizeBytes: size, CreatedAt: timestamppb.Now(), DiskMib: hostwire.DefaultDiskMiB}
	a.mu.Lock()
	imports := a.imports
	if a.payer != nil {
		a.payer(start.GetPayer())
	}
	a.mu.Unlock()
	if imports != nil {
		imports(t)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.templates[start.TemplateId] = t
	return connect.NewResponse(&hostagentv1.ImportTemplateResponse{Template: t, Digest: "sha256:0"}), nil
}

// ResolveImage returns the test's digest for the image "there".
func (a *agent) ResolveImage(ctx context.Context, req *connect.Request[hostagentv1.ResolveImageRequest]) (*connect.Response[hostagentv1.ResolveImageResponse], error) {
	if err := a.decide(ctx, "resolve"); err != nil {
		return nil, err
	}
	switch r := req.Msg.GetRegistry(); {
	case r.GetReference() != "registry.example/there:1":
		return nil, connect.NewError(connect.CodeNotFound, errors.New("the registry does not have this image"))
	case r.GetUsername() != "reader" || r.GetPassword() != "s3cret":
		return nil, connect.NewError(connect.CodePermissionDenied, errors.New("the registry denies access with these credentials"))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return connect.NewResponse(&hostagentv1.ResolveImageResponse{Pinned: "registry.example/there@sha256:" + a.digest}), nil
}

// brokenReader is a reader that ends with an error.
type brokenReader struct{ io.Reader }

func (b brokenReader) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = errors.New("the client fell over")
	}
	return n, err
}

func TestImports(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	from := func(name, reference, user, password string) response {
		return p.call("POST", "/v1/templates/import", map[string]any{"name": name, "reference": reference, "username": user, "password": password})
	}
	from("app", "registry.example/there:1", "reader", "wrong").fails(403, "permission_denied")
	from("app", "registry.example/none:1", "reader", "s3cret").fails(404, "not_found")
	from("app", "registry.example/there:1", "", "s3cret").fails(400, "invalid_argument")
	from("No Name", "registry.example/there:1", "reader", "s3cret").fails(400, "invalid_argument")
	p.call("GET", "/v1/templates/app", nil).fails(404, "not_found")
	if v := from("app", "registry.example/there:1", "reader", "s3cret").want(201).object(); v["version"] != 1. || v["size_bytes"] != 1. {
		t.Errorf("imported %v", v)
	}
	// The server streams an archive through, and it becomes the next version.
	archive := bytes.Repeat([]byte("archive"), 1<<20)
	tar := []string{"Content-Type", "application/x-tar"}
	v := p.call("POST", "/v1/templates/import/archive?name=app", io.MultiReader(bytes.NewReader(archive)), tar...).want(201).object()
	if v["version"] != 2. || v["size_bytes"] != float64(len(archive)) {
		t.Errorf("imported %v", v)
	}
	if now := p.call("GET", "/v1/templates/app", nil).want(200).object(); now["id"] != v["id"] {
		t.Errorf("app is %v", now)
	}
	p.call("POST", "/v1/sandboxes", map[string]any{"template": "app"}).want(201)
	// A truncated archive makes no template.
	asked := p.agent.called("import")
	if r, err := p.try("POST", "/v1/templates/import/archive?name=half", brokenReader{bytes.NewReader(archive)}, tar...); err == nil && r.Status < 400 {
		t.Errorf("half an archive: %d %s", r.Status, r.Body)
	}
	if n := p.agent.called("import"); n != asked {
		t.Error("the host was given half an archive")
	}
	p.call("GET", "/v1/templates/half", nil).fails(404, "not_found")

	// Other teams see only the platform's templates.
	other := p.newTeam()
	p.call("GET", "/v1/templates/app", nil, "X-API-Key", other).fails(404, "not_found")
	p.call("POST", "/v1/admin/templates/import/archive?name=ours", bytes.NewReader(archive), append(tar, "X-API-Key", other)...).fails(403, "permission_denied")
	p.call("POST", "/v1/admin/templates/import/archive?name=ours", bytes.NewReader(archive), tar...).want(201)
	p.call("GET", "/v1/templates/ours", nil, "X-API-Key", other).want(200)

	// The import continues when the client disconnects.
	g := newGate()
	p.agent.hook(g.on)
	ctx, cancel := context.WithCancel(t.Context())
	req, _ := http.NewRequestWithContext(ctx, "POST", p.http.URL+"/v1/templates/import", strings.NewReader(`{"name":"later","reference":"registry.example/there:1","username":"reader","password":"s3cret"}`))
	req.Header.Set("X-API-Key", adminKey)
	req.Header.Set("Content-Type", "application/json")
	go func() { <-g.asked; cancel() }()
	if _, err := http.DefaultClient.Do(req); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	p.call("GET", "/v1/templates/later", nil).fails(404, "not_found")
	g.release <- nil
	p.eventually("it is imported", func() bool { return p.call("GET", "/v1/templates/later", nil).Status == 200 })
}

// TestFailedImport makes an import fail whose client has disconnected. The team, and no
// other, can still read why, until an import of the same name succeeds.
func TestFailedImport(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	const why = "the registry denies access with these credentials"
	body := func(password string) map[string]any {
		return map[string]any{"name": "app", "reference": "registry.example/there:1", "username": "reader", "password": password}
	}
	leave := func(password string) {
		t.Helper()
		g := newGate()
		p.agent.hook(g.on)
		ctx, cancel := context.WithCancel(t.Context())
		raw, err := json.Marshal(body(password))
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequestWithContext(ctx, "POST", p.http.URL+"/v1/templates/import", bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-API-Key", adminKey)
		req.Header.Set("Content-Type", "application/json")
		go func() { <-g.asked; cancel() }()
		if _, err := http.DefaultClient.Do(req); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		p.agent.hook(nil)
		g.release <- nil
	}
	show := func(headers ...string) response { return p.call("GET", "/v1/templates/app", nil, headers...) }

	show().fails(404, "not_found")
	leave("wrong")
	p.eventually("the template shows why the import failed", func() bool { return strings.Contains(string(show().Body), why) })
	show().fails(404, "not_found")
	if r := p.call("GET", "/v1/templates/app@1", nil); !strings.Contains(string(r.Body), why) {
		t.Errorf("of a missing version: %s", r.Body)
	}
	if r := show("X-API-Key", p.newTeam()); strings.Contains(string(r.Body), why) {
		t.Errorf("another team sees %s", r.Body)
	}
	p.call("POST", "/v1/templates/import", body("s3cret")).want(201)
	if got := show().want(200).object(); got["failed_import"] != nil {
		t.Errorf("after an import that succeeded: %v", got)
	}
	// An existing version stays, and shows the failure of the next.
	leave("wrong")
	p.eventually("the template shows the failure of its next version", func() bool { return show().want(200).object()["failed_import"] != nil })
	got := show().object()
	if f := got["failed_import"].(map[string]any); f["error"] != why || got["version"] != 1. {
		t.Errorf("with a version before: %v", got)
	}
	p.call("POST", "/v1/sandboxes", map[string]any{"template": "app"}).want(201)

	// If the host vanished during the import, the failure says only that.
	g := newGate()
	p.agent.hook(g.on)
	gone := p.later("POST", "/v1/templates/import", map[string]any{"name": "lost", "reference": "registry.example/there:1", "username": "reader", "password": "s3cret"})
	<-g.asked
	p.agent.hook(nil)
	p.agent.vanish()
	if r := <-gone; r.Status != 503 {
		t.Errorf("with its host away: %d %s", r.Status, r.Body)
	}
	p.agent.serve(t)
	if r := p.call("GET", "/v1/templates/lost", nil); r.Status != 404 || !strings.Contains(string(r.Body), "the sandbox's host does not respond") {
		t.Errorf("of an import whose host went away: %d %s", r.Status, r.Body)
	}
	// The number of stored failures is bounded.
	for n := range 30 {
		p.call("POST", "/v1/templates/import", map[string]any{"name": fmt.Sprintf("no%d", n), "reference": "registry.example/none:1"}).fails(404, "not_found")
	}
	var n int
	if err := p.db().QueryRow(t.Context(), "SELECT count(*) FROM failed_imports").Scan(&n); err != nil || n > 20 {
		t.Errorf("%d failures are kept, %v", n, err)
	}
	if r := p.call("GET", "/v1/templates/no29", nil); !strings.Contains(string(r.Body), "the registry does not have this image") {
		t.Errorf("of the last: %s", r.Body)
	}
}

// gateway is a guest's code interpreter, or a port that claims to be one.
func gateway(w http.ResponseWriter, r *http.Request) {
	switch r.Method + r.URL.Path[strings.Index(r.URL.Path, "/49999")+6:] {
	case "POST/execute":
		body, _ := io.ReadAll(r.Body)
		switch {
		case bytes.Contains(body, []byte("broken")):
			fmt.Fprintln(w, `{"type":"stdout","text":"half"}`)
			return
		case bytes.Contains(body, []byte("nonsense")):
			fmt.Fprintln(w, `<html>`)
			return
		}
		fmt.Fprintln(w, `{"type":"stdout","text":"a"}
{"type":"stdout","text":"b"}
{"type":"stderr","text":"c"}
{"type":"result","is_main_result":true,"text":"42","html":"<b>42</b>","extra":{"x/y":1}}
{"type":"error","name":"E","value":"v","traceback":"t"}
{"type":"number_of_executions","execution_count":3}
{"type":"end_of_execution"}`)
	case "GET/contexts":
		fmt.Fprintln(w, `[{"id":"default","language":"python","cwd":"/home/user","evil":"<"}]`)
	case "POST/contexts":
		w.WriteHeader(201)
		fmt.Fprintln(w, `{"id":"x","language":"python","cwd":"/tmp"}`)
	case "DELETE/contexts/x", "POST/contexts/x/restart":
		w.WriteHeader(204)
	default:
		w.WriteHeader(404)
		fmt.Fprintln(w, `{"code":404,"message":"no such context"}`)
	}
}

func TestCode(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	base := "/v1/sandboxes/" + sandbox + "/code"
	p.call("POST", base, map[string]any{"code": "1"}).fails(409, "conflict") // nothing listens
	p.agent.guest = http.HandlerFunc(gateway)
	got := string(p.call("POST", base, map[string]any{"code": "1"}).want(200).Body)
	want := `{"error":{"name":"E","traceback":"t","value":"v"},"execution_count":3,"results":[{"extra":{"x/y":1},"html":"<b>42</b>","is_main_result":true,"text":"42"}],"stderr":"c","stdout":"ab"}`
	if strings.TrimSpace(got) != want {
		t.Errorf("code: %s", got)
	}
	if got := string(p.call("POST", base, map[string]any{"code": "1", "stream": true}).want(200).Body); strings.Count(got, "\n") != 7 || !strings.HasSuffix(got, "{\"type\":\"end_of_execution\"}\n") {
		t.Errorf("a stream: %s", got)
	}
	p.call("POST", base, map[string]any{"code": "broken"}).fails(502, "bad_gateway")
	p.call("POST", base, map[string]any{"code": "nonsense"}).fails(502, "bad_gateway")
	p.call("POST", base, map[string]any{"code": "1", "timeout_seconds": 0}).fails(400, "invalid_argument")
	if all := string(p.call("GET", base+"/contexts", nil).want(200).Body); strings.Contains(all, "evil") {
		t.Errorf("contexts: %s", all)
	}
	p.call("POST", base+"/contexts", map[string]any{}).want(201)
	p.call("DELETE", base+"/contexts/x", nil).want(204)
	p.call("POST", base+"/contexts/x/restart", nil).want(204)
	p.call("DELETE", base+"/contexts/y", nil).fails(404, "not_found")
	p.call("POST", base, map[string]any{"code": "1"}, "X-API-Key", p.newTeam()).fails(404, "not_found")
}

// TestUploadsOfOneOwner checks that all teams of one owner share one part of the room for
// uploads, so that more teams get nobody more.
func TestUploadsOfOneOwner(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.SpoolDir, p.config.SpoolMiB = t.TempDir(), 16 // an owner's share is one step
	p.start()
	with := func(key string) []string { return []string{"Content-Type", "application/x-tar", "X-API-Key", key} }
	ada, bob := p.ownerOf(2, "ada@example.com"), p.ownerOf(1, "bob@example.com")
	one, two, other := with(ada[0]), with(ada[1]), with(bob[0])
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = p.try("POST", "/v1/templates/import/archive?name=slow", io.MultiReader(r), one...)
	}()
	t.Cleanup(func() { w.CloseWithError(io.ErrUnexpectedEOF); <-done })
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	upload := func(key []string) response {
		return p.call("POST", "/v1/templates/import/archive?name=quick", []byte("abc"), key...)
	}
	// Wait until the slow upload has its room; the other team's could take it otherwise.
	p.eventually("the slow upload's byte is kept", func() bool { return kept(p.config.SpoolDir) })
	upload(two).fails(429, "rate_limited")
	upload(other).want(201)
}

// TestImportHostDrains checks that an archive goes to a host that takes work when the
// archive has arrived, even if another did when the upload began.
func TestImportHostDrains(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Heartbeat = 2 * time.Second
	p.start()
	var first uuid.UUID
	if err := p.db().QueryRow(t.Context(), "SELECT id FROM hosts").Scan(&first); err != nil {
		t.Fatal(err)
	}
	second := p.enroll("second")
	stop := second.beat(p, p.config.Heartbeat/2)
	defer stop()
	p.eventually("the second host is online", func() bool { return p.hostStatus(second.id) == "online" })
	p.compared(second.agent)
	drain := func(host string, is bool) {
		p.call("PATCH", "/v1/admin/hosts/"+host, map[string]any{"draining": is}).want(200)
	}
	drain(second.id, true)
	body, client := io.Pipe()
	defer client.Close()
	answer := make(chan response, 1)
	go func() {
		r, err := p.try("POST", "/v1/templates/import/archive?name=app", body, "Content-Type", "application/x-tar")
		if err != nil {
			t.Error(err)
		}
		answer <- r
	}()
	// Send more than socket buffers hold, so that the server has begun to receive it.
	if _, err := io.Copy(client, bytes.NewReader(make([]byte, 32<<20))); err != nil {
		t.Fatal(err)
	}
	drain(second.id, false)
	drain(id.Format(id.Host, first), true)
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	v := await.Recv(t, "the archive is imported", answer).want(201)
	if p.agent.hasTemplate(v.str("id")) || !second.hasTemplate(v.str("id")) {
		t.Error("the draining host made the template")
	}
}

// kept reports whether this process has an open, non-empty file in a folder. The file may
// have been unlinked.
func kept(dir string) bool {
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		at := filepath.Join("/proc/self/fd", fd.Name())
		name, err := os.Readlink(at)
		if err != nil || !strings.HasPrefix(name, dir+"/") {
			continue
		}
		if info, err := os.Stat(at); err == nil && info.Mode().IsRegular() && info.Size() > 0 {
			return true
		}
	}
	return false
}
