package envd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/envd/account"
	"github.com/wrenn-dev/wrenn/internal/envd/fault"
	"github.com/wrenn-dev/wrenn/internal/envd/machine"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// initRequest is /init's body. Absent fields change nothing, and unknown ones are ignored.
type initRequest struct {
	EnvVars        map[string]string `json:"envVars"`
	AccessToken    string            `json:"accessToken"`
	DefaultUser    string            `json:"defaultUser"`
	DefaultWorkdir *string           `json:"defaultWorkdir"`
	Timestamp      hostTime          `json:"timestamp"` // the host's time, RFC 3339
	Entropy        []byte            `json:"entropy"`   // secret random bytes, in base64
	Hostname       string            `json:"hostname"`
	GrowDisk       int64             `json:"growDisk"` // bytes that the disk of / has now
	Debug          *bool             `json:"debug"`    // whether the log has the level debug
	Thaw           bool              `json:"thaw"`
}

// hostTime is zero if the client sends a time in another format than the agent's.
type hostTime struct{ time.Time }

func (t *hostTime) UnmarshalJSON(b []byte) error {
	if t.Time.UnmarshalJSON(b) != nil {
		t.Time = time.Time{}
	}
	return nil
}

// initReply is the body of a response with results or warnings. Otherwise the response is
// 204, without a body.
type initReply struct {
	Disk     int64    `json:"disk,omitempty"`     // size of / in bytes, after it grew
	Warnings []string `json:"warnings,omitempty"` // failures that do not prevent the use of the guest
}

const (
	minEntropy = 32 // bytes, the size of the kernel generator's key
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
	// Only at first, because a user may remove it later.
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

// init serves /init, the agent's first request after a boot or a restore, which gives the
// guest the identity of its sandbox. The first call needs no token, because no user's
// process runs before it. Every later one needs the present token. It is idempotent.
//
// Because every creation waits for it, it starts no process and waits for no disk.
func (s *Server) init(w http.ResponseWriter, r *http.Request) {
	allowed := func() bool {
		token := s.current().token
		if token == "" || sameSecret(r.Header.Get(hostwire.AccessToken), token) {
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
		fault.Write(w, http.StatusBadRequest, connect.CodeInvalidArgument, "the body is not a valid JSON object")
		return
	}
	s.initialising.Lock()
	defer s.initialising.Unlock()
	if !allowed() { // another request may have changed the token
		return
	}
	if err := req.check(s.current().token == ""); err != nil {
		fault.Write(w, http.StatusBadRequest, connect.CodeInvalidArgument, err.Error())
		return
	}
	reply, err := s.become(r.Context(), &req)
	if err != nil {
		s.log.Error("take the sandbox's identity", "error", err)
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

// become applies a request of /init. It first changes what must not be shared with another
// guest, and thaws users' processes last. After an error the guest does not have the
// sandbox's identity and must not be used.
func (s *Server) become(ctx context.Context, req *initRequest) (initReply, error) {
	var reply initReply
	warn := func(err error) {
		if err != nil {
			s.log.Warn("take the sandbox's identity", "error", err)
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
			warn(fmt.Errorf("keep the default user: %w", err))
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
	if req.Debug != nil && s.cfg.Level != nil {
		level := slog.LevelInfo
		if *req.Debug {
			level = slog.LevelDebug
		}
		s.cfg.Level.Set(level)
	}

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
