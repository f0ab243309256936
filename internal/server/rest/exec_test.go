package rest

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/coder/websocket"

	"github.com/wrenn-dev/wrenn/internal/await"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
)

// unreading is an agent whose commands do not read their input.
type unreading struct {
	hostagentv1connect.UnimplementedHostAgentHandler
}

func (unreading) ExecStream(ctx context.Context, _ *connect.BidiStream[hostagentv1.ExecStreamRequest, hostagentv1.ExecStreamResponse]) error {
	<-ctx.Done()
	return ctx.Err()
}

// TestUnreadInput ends a command that does not read its input.
func TestUnreadInput(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "s.sock")
	l, err := netaddr.Listen(t.Context(), addr, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentHandler(unreading{}))
	agent, served := netaddr.Server(mux), make(chan error, 1)
	go func() { served <- agent.Serve(l) }()
	defer func() { agent.Close(); <-served }()
	c, base := netaddr.HTTPClient(addr)

	ended := make(chan error, 1)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer ws.CloseNow()
		call, cancel := context.WithCancel(await.Context(t))
		defer cancel()
		stream := hostagentv1connect.NewHostAgentClient(c, base).ExecStream(call)
		ended <- new(API).pumpInput(call, ws, auth.Principal{}, stream, cancel, 100*time.Millisecond)
	}))
	defer srv.Close()
	ws, _, err := websocket.Dial(await.Context(t), srv.URL, nil) //nolint:bodyclose // The response has no body.
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	for piece := make([]byte, 16<<10); ws.Write(await.Context(t), websocket.MessageBinary, piece) == nil; {
	}
	if err := await.Recv(t, "the input ends", ended); !errors.Is(err, errUnread) {
		t.Errorf("%v", err)
	}
}
