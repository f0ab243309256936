package envd

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/envd/account"
	"github.com/wrenn-dev/wrenn/internal/envd/fault"
	"github.com/wrenn-dev/wrenn/internal/filesign"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/patience"
)

// sameSecret compares in a time that depends neither on where the two differ nor on the
// secret's length.
func sameSecret(given, secret string) bool {
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(secret))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

func unauthenticated(w http.ResponseWriter, message string) {
	fault.Write(w, http.StatusUnauthorized, connect.CodeUnauthenticated, message)
}

// guard requires the token or, for /files, a signature made with it.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token := s.current().token
		if token == "" {
			fault.Write(w, http.StatusServiceUnavailable, connect.CodeUnavailable, "the sandbox is not ready yet")
			return
		}
		if given := r.Header.Get(hostwire.AccessToken); given != "" {
			if !sameSecret(given, token) {
				unauthenticated(w, "the access token is wrong")
				return
			}
		} else if filesign.Signed(r.URL) {
			if err := filesign.Check(r.Method, r.URL.Query(), token, time.Now()); err != nil {
				unauthenticated(w, err.Error())
				return
			}
		} else {
			unauthenticated(w, "an access token is needed")
			return
		}
		patience.Idle(r) // clients may send files and input slowly
		next.ServeHTTP(w, r)
	})
}

// identify finds the user of a request: for files the one in the query, otherwise the one
// in HTTP basic authentication, otherwise the default (root if the guest does not have
// the default user). For a signed request only the query counts, because it is signed.
func (s *Server) identify(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := ""
		if r.URL.Path == "/files" || r.URL.Path == "/archive" {
			name = r.URL.Query().Get("username")
		}
		// A colon would make the signed text ambiguous.
		if strings.Contains(name, ":") {
			refuse(w, r, unknownUser(name))
			return
		}
		if name == "" && r.Header.Get(hostwire.AccessToken) != "" {
			name, _, _ = r.BasicAuth()
		}
		byDefault := name == ""
		if byDefault {
			name = s.current().user
		}
		who, err := account.Lookup(name)
		// An imported image may lack the default user, but it has root.
		if errors.Is(err, account.ErrUnknown) && byDefault && name == s.cfg.DefaultUser {
			who, err = account.Lookup("root")
		}
		if errors.Is(err, account.ErrUnknown) {
			err = unknownUser(name)
		}
		if err != nil {
			refuse(w, r, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(account.NewContext(r.Context(), who)))
	})
}

func unknownUser(name string) error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("the sandbox has no user or group %q; it always has root", name))
}

// refuse responds with an error, in the protocol of the request.
func refuse(w http.ResponseWriter, r *http.Request, err error) {
	if rpc := connect.NewErrorWriter(); rpc.IsSupported(r) {
		_ = rpc.Write(w, r, fault.Connect(err)) // fails only if the client's connection is gone
		return
	}
	fault.WriteError(w, err)
}
