package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/agent/image/oci"
	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// refusing is an agent whose Host call fails with an error, or panics.
type refusing struct {
	hostagentv1connect.UnimplementedHostAgentHandler
	of  service
	err error
}

func (r *refusing) Host(ctx context.Context, _ *connect.Request[hostagentv1.HostRequest]) (*connect.Response[hostagentv1.HostResponse], error) {
	if r.err == nil {
		panic("in /var/lib/wrenn")
	}
	return nil, r.of.fault(ctx, "host", r.err)
}

// TestErrorsAreForClients checks that an error sent to a client names nothing of
// the host, such as its paths and addresses.
func TestErrorsAreForClients(t *testing.T) {
	a := &Agent{log: slog.New(slog.DiscardHandler)}
	a.sandboxes = &sandbox.Manager{Config: sandbox.Config{Dir: "/"}}
	inner := &fs.PathError{Op: "open", Path: "/var/lib/wrenn/images/x", Err: fs.ErrPermission}
	pausedLife, pause := context.WithCancelCause(t.Context())
	pause(&sandbox.StateError{State: sandbox.Paused})
	paused := &sandbox.Use{Context: pausedLife}
	for _, tt := range []struct {
		name string
		err  error
		code connect.Code
		want string
		why  string
	}{
		{"internal", fmt.Errorf("capture: %w", inner), connect.CodeInternal, "the host failed", ""},
		{"panic", nil, connect.CodeInternal, "the host failed", ""},
		{"joined", errors.Join(oci.Refuse(inner, "its working directory cannot be made"), inner), connect.CodeInvalidArgument, "the image is refused: its working directory cannot be made", ""},
		{"an archive", blame(false, fmt.Errorf("read: %w", errors.New("in /var/lib/wrenn"))), connect.CodeInvalidArgument, "the image is refused: it is neither an OCI image layout nor what docker save writes", ""},
		{"a registry", blame(true, errors.New("dial tcp 10.0.0.1:443")), connect.CodeUnavailable, "the registry did not answer as a registry should", ""},
		{"a bare code", connect.NewError(connect.CodeUnavailable, inner), connect.CodeUnavailable, "the host cannot do this now", ""},
		{"captures", fmt.Errorf("snapshot: %w", sandbox.ErrCaptures), connect.CodeFailedPrecondition, "the sandbox has been captured as often as it can be", hostwire.CaptureLimit},
		{"a host's failure", fmt.Errorf("create: %w", sandbox.ErrStart), connect.CodeUnavailable, "the sandbox did not start", ""},
		{"a guest's failure", errors.Join(sandbox.ErrGuest, connect.NewError(connect.CodeInvalidArgument, clienterr.New("no such user"))), connect.CodeUnavailable, "the sandbox's guest did not start", hostwire.GuestStart},
		{"a slow guest", fmt.Errorf("create: %w", sandbox.ErrSlow), connect.CodeUnavailable, "the sandbox's guest did not start in time", hostwire.GuestSlow},
		{"a call that a pause cut off", callError(paused, inner), connect.CodeFailedPrecondition, "the sandbox became paused during the call, which may have taken effect", ""},
		{"state", fmt.Errorf("/var/lib: %w", &sandbox.StateError{State: sandbox.Paused}), connect.CodeFailedPrecondition, "the sandbox is paused", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mux := http.NewServeMux()
			mux.Handle(hostagentv1connect.NewHostAgentHandler(&refusing{of: service{a}, err: tt.err}, a.options()...))
			s := httptest.NewServer(mux)
			defer s.Close()
			_, err := hostagentv1connect.NewHostAgentClient(s.Client(), s.URL).Host(t.Context(), connect.NewRequest(&hostagentv1.HostRequest{}))
			var ce *connect.Error
			if !errors.As(err, &ce) || ce.Code() != tt.code || ce.Message() != tt.want || ce.Meta().Get(hostwire.ErrorReason) != tt.why {
				t.Errorf("%v, want %v: %s", err, tt.code, tt.want)
			}
			if ce != nil && (ce.Meta().Get(hostwire.SandboxState) != "") != (tt.name == "state") {
				t.Errorf("the state is %q: the control plane calls again if there is one", ce.Meta().Get(hostwire.SandboxState))
			}
			if strings.Contains(fmt.Sprint(err), "/var/lib") {
				t.Errorf("the host's folders are in %v", err)
			}
		})
	}
}

// TestRegistryTexts checks that a tenant gets one of four texts, whatever answers at the
// address of a registry, and that the log has the cause.
func TestRegistryTexts(t *testing.T) {
	texts := []string{
		"the registry denies access with these credentials", "the registry does not have this image", "the registry sends too slowly", "the registry did not answer as a registry should",
	}
	answer := func(status int, body string) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = w.Write([]byte(body))
		}))
		t.Cleanup(s.Close)
		return strings.TrimPrefix(s.URL, "http://") + "/x:1"
	}
	closed := httptest.NewServer(nil)
	closed.Close()
	hangsUp := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	t.Cleanup(hangsUp.Close)
	var asking sync.WaitGroup // together: some are asked again a few seconds later
	defer asking.Wait()
	check := func(what, reference string, a oci.Access, want int, cause string) {
		asking.Go(func() {
			_, err := oci.Pin(t.Context(), reference, a)
			var ce *connect.Error
			if err = blame(true, err); !errors.As(err, &ce) {
				ce = connect.NewError(connect.CodeUnavailable, err)
			}
			shown, _ := clienterr.Shown(ce)
			if shown.Message() != texts[want] {
				t.Errorf("%s: a tenant gets %q, want %q", what, shown.Message(), texts[want])
			}
			if !strings.Contains(err.Error(), cause) {
				t.Errorf("%s: the log has %v, without %q", what, err, cause)
			}
		})
	}
	here := oci.Access{Loopback: true}
	for status, want := range map[int]int{401: 0, 403: 0, 404: 1} {
		check(fmt.Sprint(status), answer(status, ""), here, want, "")
	}
	for _, status := range []int{201, 204, 302, 400, 418, 429, 500, 503} {
		check(fmt.Sprint(status), answer(status, "secret"), here, 3, "")
	}
	check("a server's error", answer(503, ""), here, 3, "503")
	check("another server", answer(200, "<html>"), here, 3, "")
	check("nobody listens", strings.TrimPrefix(closed.URL, "http://")+"/x:1", here, 3, "refused")
	check("it hangs up", strings.TrimPrefix(hangsUp.URL, "http://")+"/x:1", here, 3, "EOF")
	check("this machine, which is not allowed", answer(200, ""), oci.Access{}, 3, netaddr.ErrNotAllowed.Error())
	for _, at := range []string{"10.11.0.7:8443", "192.168.1.1", "169.254.169.254", "[fd12::1]:443", "no-such-name.invalid"} {
		check(at, at+"/x:1", oci.Access{}, 3, "")
	}
}

// TestWrongTokenIsLogged checks that the log says why a request was refused before it
// reached an operation.
func TestWrongTokenIsLogged(t *testing.T) {
	var log strings.Builder
	a := &Agent{cfg: Config{Token: "right"}, log: slog.New(slog.NewTextHandler(&log, nil))}
	r := httptest.NewRequest(http.MethodPost, "/hostagent.v1.HostAgent/List", nil)
	r.Header.Set("Authorization", "Bearer hunter2")
	w := httptest.NewRecorder()
	if a.admit(w, r) {
		t.Error("a wrong token is admitted")
	}
	if got := log.String(); w.Code != http.StatusUnauthorized || !strings.Contains(got, "code=unauthenticated") || !strings.Contains(got, "/hostagent.v1.HostAgent/List") || strings.Contains(got, "hunter2") {
		t.Errorf("status %d, and the log says %q", w.Code, got)
	}
}
