package envd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/envd/account"
	"github.com/wrenn-dev/wrenn/internal/envd/fault"
	"github.com/wrenn-dev/wrenn/internal/envd/machine"
)

// initRequest is /init's body. What is absent stays as it is; what is not
// here means nothing.
type initRequest struct {
	EnvVars        map[string]string `json:"envVars"`
	AccessToken    string            `json:"accessToken"`
	DefaultUser    string            `json:"defaultUser"`
	DefaultWorkdir *string           `json:"defaultWorkdir"`
	Timestamp      hostTime          `json:"timestamp"` // the host's time, RFC 3339
	Entropy        []byte            `json:"entropy"`   // secret random bytes, in base64
	Hostname       string            `json:"hostname"`
	GrowDisk       int64             `json:"growDisk"` // bytes that the disk of / has now
	Thaw           bool              `json:"thaw"`
}

// hostTime is the zero time where the client sends something else than we do.
type hostTime struct{ time.Time }

func (t *hostTime) UnmarshalJSON(b []byte) error {
	if t.Time.UnmarshalJSON(b) != nil {
		t.Time = time.Time{}
	}
	return nil
}

// initReply is the body of an answer that has more to tell than that all went
// well; that one is 204, without a body.
type initReply struct {
	Disk     int64    `json:"disk,omitempty"`     // bytes of / once grown
	Warnings []string `json:"warnings,omitempty"` // what did not work and need not stop the guest
}

const (
	minEntropy = 32 // bytes: what the kernel's generator holds
	maxEntropy = 1 << 10
)

func (req *initRequest) check(first bool) error {
	if first && req.AccessToken == "" {
		return errors.New("an access token is needed")
	}
	for k, v := range req.EnvVars {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(v, 0) {
			return fmt.Errorf("environment variable %q cannot be set", k)
		}
	}
	// Later a user of the guest may have removed it.
	if first && req.DefaultUser != "" {
		if _, err := account.Lookup(req.DefaultUser); err != nil {
			return err
		}
	}
	if req.DefaultWorkdir != nil && strings.ContainsRune(*req.DefaultWorkdir, 0) {
		return errors.New("the working directory has a NUL byte")
	}
	if n := len(req.Entropy); n != 0 && (n < minEntropy || n > maxEntropy) {
		return fmt.Errorf("%d bytes of entropy are not between %d and %d", n, minEntropy, maxEntropy)
	}
	if req.Hostname != "" && !machine.ValidName(req.Hostname) {
		return fmt.Errorf("%q is not a host name", req.Hostname)
	}
	if req.GrowDisk < 0 {
		return errors.New("the disk's size is negative")
	}
	return nil
}

// init makes the guest its sandbox's own: it is the first thing that the agent
// says after a boot or a restore. The first call needs no token: nothing of a
// user's runs in the guest before it. Every later one needs the token that is
// in force. Repeating it does no harm.
//
// Nothing on its way starts a process or waits for a disk: a sandbox is
// created in the time that this takes.
func (s *Server) init(w http.ResponseWriter, r *http.Request) {
	allowed := func() bool {
		token := s.current().token
		if token == "" || sameSecret(r.Header.Get(TokenHeader), token) {
			return true
		}
		unauthenticated(w, "the access token is missing or wrong")
		return false
	}
	if !allowed() {
		return
	}
	var req initRequest
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 4<<20))
	if err == nil {
		err = json.Unmarshal(body, &req)
	}
	if err != nil {
		fault.Write(w, http.StatusBadRequest, connect.CodeInvalidArgument, "the body is not the JSON object that is expected")
		return
	}
	s.initialising.Lock()
	defer s.initialising.Unlock()
	if !allowed() { // another request may have changed the token meanwhile
		return
	}
	if err := req.check(s.current().token == ""); err != nil {
		fault.Write(w, http.StatusBadRequest, connect.CodeInvalidArgument, err.Error())
		return
	}
	reply, err := s.become(r.Context(), &req)
	if err != nil {
		s.log.Error("become the sandbox's own", "error", err)
		fault.WriteError(w, err)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	if reply.Disk == 0 && len(reply.Warnings) == 0 {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(reply)
}

// become does what /init asks for. What must not be shared with another guest
// comes first, users' processes go on last. An error means that the guest is
// not the sandbox's own and must not be used.
func (s *Server) become(ctx context.Context, req *initRequest) (initReply, error) {
	var reply initReply
	warn := func(err error) {
		if err != nil {
			s.log.Warn("become the sandbox's own", "error", err)
			reply.Warnings = append(reply.Warnings, err.Error())
		}
	}
	m := s.cfg.Machine
	if m != nil && len(req.Entropy) > 0 {
		if err := m.Reseed(req.Entropy); err != nil {
			return reply, err
		}
	}
	s.open.shed(ctx)

	user := req.DefaultUser
	if user != "" {
		if _, err := account.Lookup(user); err != nil {
			warn(fmt.Errorf("the default user stays: %w", err))
			user = ""
		}
	}
	s.mu.Lock()
	if req.EnvVars != nil {
		s.state.envs = req.EnvVars
	}
	if req.AccessToken != "" {
		s.state.token = req.AccessToken
	}
	if user != "" {
		s.state.user = user
	}
	if req.DefaultWorkdir != nil {
		s.state.workdir = *req.DefaultWorkdir
	}
	s.mu.Unlock()

	if m != nil {
		if !req.Timestamp.IsZero() {
			warn(m.SetClock(req.Timestamp.Time))
		}
		if req.Hostname != "" {
			warn(m.Rename(req.Hostname))
		}
		if req.EnvVars != nil {
			warn(m.Export(req.EnvVars))
		}
		if req.GrowDisk > 0 {
			var err error
			reply.Disk, err = m.Grow(ctx, req.GrowDisk)
			warn(err)
		}
	}
	if req.Thaw && s.tree != nil {
		ctx, cancel := context.WithTimeout(ctx, freezeLimit)
		defer cancel()
		return reply, s.thaw(ctx)
	}
	return reply, nil
}
