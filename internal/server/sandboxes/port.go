package sandboxes

import (
	"bytes"
	"context"
	"net/http"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// RefusedAs reports whether a host refused a request to a port because of the sandbox's
// state, which [Service.Refused] can change.
func RefusedAs(resp *http.Response) (State, bool) {
	state := State(hostwire.RefusedState(resp))
	switch state {
	case Pausing, Paused, Resuming:
		return state, true
	default: // The sandbox responded, or cannot be resumed.
		return "", false
	}
}

// Port sends a request, with a JSON body if body is not nil, to a port of a team's
// sandbox. It resumes a paused sandbox. The response, whatever its status, is the
// guest's, or the agent's if nothing listens on the port.
func (s *Service) Port(ctx context.Context, team, sandbox uuid.UUID, port int, method, path string, body []byte) (*http.Response, error) {
	_, host, err := s.Wake(ctx, team, sandbox)
	for try := 1; err == nil; try++ {
		url := "http://agent" + hostwire.ProxyPath(id.Format(id.Sandbox, sandbox), port) + path
		req, invalid := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
		if invalid != nil {
			return nil, invalid
		}
		if body != nil {
			req.Header.Set("Content-Type", "application/json")
		}
		host.Authorize(req.Header)
		resp, failed := host.Transport().RoundTrip(req)
		if failed != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, fault.Because(failed, fault.HostUnreachable, "the sandbox's host does not respond")
		}
		state, refused := RefusedAs(resp)
		if !refused {
			return resp, nil
		}
		resp.Body.Close()
		if try == Tries {
			return nil, fault.New(fault.Conflict, "the sandbox is %s", state)
		}
		if _, host, err = s.Refused(ctx, team, sandbox); err != nil {
			return nil, err
		}
	}
	return nil, err
}
