package hosts

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"connectrpc.com/connect"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/text"
)

// verbose is a host whose errors are long and contain NUL.
type verbose struct {
	hostagentv1connect.UnimplementedHostAgentHandler
	code connect.Code
}

// Get implements [hostagentv1connect.HostAgentHandler].
func (v verbose) Get(context.Context, *connect.Request[hostagentv1.GetRequest]) (*connect.Response[hostagentv1.GetResponse], error) {
	return nil, connect.NewError(v.code, errors.New("a\x00"+strings.Repeat("é", 1<<14)))
}

// TestFaultIsShort checks that the text of a host's error is bounded and valid, because the
// server stores it and sends it to clients.
func TestFaultIsShort(t *testing.T) {
	for _, code := range []connect.Code{connect.CodeInvalidArgument, connect.CodeNotFound, connect.CodeResourceExhausted, connect.CodeUnavailable} {
		_, h := hostagentv1connect.NewHostAgentHandler(verbose{code: code})
		web := httptest.NewServer(h)
		c := hostagentv1connect.NewHostAgentClient(http.DefaultClient, web.URL)
		_, err := c.Get(t.Context(), connect.NewRequest(&hostagentv1.GetRequest{}))
		web.Close()
		if !connect.IsWireError(err) {
			t.Fatal(err)
		}
		for _, got := range []error{Fault(err), FaultIn("pause", err)} {
			var f *fault.Error
			if !errors.As(got, &f) {
				t.Fatal(got)
			}
			if s := f.Message; !strings.Contains(s, "é") || len(s) > maxText+100 || !text.Valid(s) {
				t.Errorf("%v: %d bytes, valid: %v: %.50q", code, len(s), text.Valid(s), s)
			}
		}
	}
}
