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
	"github.com/wrenn-dev/wrenn/internal/patience"
)

// TokenHeader is the request header with the sandbox's access token.
const TokenHeader = "X-Access-Token"

// sameSecret compares in a time that tells nothing of where the two differ,
// nor of the secret's length.
func sameSecret(given, secret string) bool {
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(secret))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

func unauthenticated(w http.ResponseWriter, message string) {
	fault.Write(w, http.StatusUnauthorized, connect.CodeUnauthenticated, message)
}

// guard lets only holders of the token through, and to /files those with a
// signature made with it.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token := s.current().token
		if token == "" {
			fault.Write(w, http.StatusServiceUnavailable, connect.CodeUnavailable, "the sandbox is not ready yet")
			return
		}
		if given := r.Header.Get(TokenHeader); given != "" {
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
		patience.Idle(r) // Files and input are as slow as those who send them.
		next.ServeHTTP(w, r)
	})
}

// identify finds the user that a request is for: for files what the query
// says, else what HTTP basic authentication says, else the default, which is
// root where the guest has no user of the daemon's default name. A signed
// request counts by its query alone, since that is what was signed.
func (s *Server) identify(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := ""
		if r.URL.Path == "/files" || r.URL.Path == "/archive" {
			name = r.URL.Query().Get("username")
		}
		// What is signed must mean one thing.
		if strings.Contains(name, ":") {
			refuse(w, r, unknownUser(name))
			return
		}
		if name == "" && r.Header.Get(TokenHeader) != "" {
			name, _, _ = r.BasicAuth()
		}
		byDefault := name == ""
		if byDefault {
			name = s.current().user
		}
		who, err := account.Lookup(name)
		// An image from elsewhere has no such user, but root.
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

// refuse answers a request with an error, in the protocol of the request.
func refuse(w http.ResponseWriter, r *http.Request, err error) {
	if rpc := connect.NewErrorWriter(); rpc.IsSupported(r) {
		_ = rpc.Write(w, r, fault.Connect(err)) // an error here is the client's connection
		return
	}
	fault.WriteError(w, err)
}
