package envd

import (
	"bytes"
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/gen/filesystem"
	"github.com/wrenn-dev/wrenn/internal/gen/filesystem/filesystemconnect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/requestid"
)

// TestFailedCallsAreLogged checks that the log has each failed call, with the id of the
// client's request.
func TestFailedCallsAreLogged(t *testing.T) {
	var log bytes.Buffer
	s, err := New(Config{DefaultUser: "root", Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(s.Handler())
	defer web.Close()
	resp, err := http.Post(web.URL+"/init", "application/json", strings.NewReader(`{"accessToken":"`+testToken+`"}`))
	if err != nil || resp.StatusCode != http.StatusNoContent {
		t.Fatalf("/init: %v, %v", resp, err)
	}
	resp.Body.Close()
	stat := func(path string) error {
		req := connect.NewRequest(&filesystem.StatRequest{Path: path})
		req.Header().Set(hostwire.AccessToken, testToken)
		req.Header().Set(requestid.Header, "ext-1")
		_, err := filesystemconnect.NewFilesystemClient(http.DefaultClient, web.URL).Stat(t.Context(), req)
		return err
	}
	if err := stat("/"); err != nil {
		t.Fatal(err)
	}
	if err := stat("/no/such/file"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Fatal(err)
	}
	web.Close() // Its handlers have ended.
	if got, want := log.String(), `level=DEBUG msg="call failed" request_id=ext-1 procedure=/filesystem.Filesystem/Stat error=`; strings.Count(got, "call failed") != 1 || !strings.Contains(got, want) {
		t.Errorf("the log has %q, want %q once", got, want)
	}
}

// TestInitSetsTheLogLevel checks that the log has each request with an id while the agent
// wants the level debug, and only then.
func TestInitSetsTheLogLevel(t *testing.T) {
	var log bytes.Buffer
	level := new(slog.LevelVar)
	s, err := New(Config{DefaultUser: "root", Level: level, Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: level}))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(context.Background()) })
	for _, step := range []struct {
		init string
		want bool
	}{
		{`{"accessToken":"` + testToken + `"}`, false},
		{`{"debug":true}`, true},
		{`{}`, true}, // an agent of an earlier release
		{`{"debug":false}`, false},
	} {
		if w := post(s, testToken, step.init); w.Code != http.StatusNoContent {
			t.Fatalf("%s: %d %s", step.init, w.Code, w.Body)
		}
		log.Reset()
		for _, id := range []string{"ext-1", ""} {
			r := httptest.NewRequest(http.MethodGet, "/files?path=/no/such/secret", nil)
			r.Header.Set(hostwire.AccessToken, testToken)
			r.Header.Set(requestid.Header, id)
			s.Handler().ServeHTTP(httptest.NewRecorder(), r)
		}
		_, got, _ := strings.Cut(log.String(), "level=")
		if want := "DEBUG msg=request request_id=ext-1 method=GET path=/files\n"; (got == want) != step.want || !step.want && got != "" {
			t.Errorf("after %s the log has %q", step.init, got)
		}
	}
}
