package rest

import (
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/getkin/kin-openapi/openapi3"

	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
)

// How often one address may call what anybody may.
var (
	limitPublic = ratelimit.Limit{Name: "public", Burst: 600, Per: time.Minute}
	limitLogin  = ratelimit.Limit{Name: "login", Burst: 30, Per: time.Minute}
	// Many hosts may be behind one address.
	limitHosts = ratelimit.Limit{Name: "hosts", Burst: 12000, Per: time.Minute}
)

// admit bounds how often an address may call an operation that anybody may.
func (a *API) admit(r *http.Request, op *openapi3.Operation) error {
	from := a.clientAddress(r)
	if !from.IsValid() {
		return nil // By a socket of this machine's, and not through the front door.
	}
	limit := limitPublic
	switch op.Tags[0] {
	case "login":
		limit = limitLogin
		limit.Name += ":" + op.OperationID
	case "hosts":
		limit = limitHosts
	}
	return a.Limiter.Allow(r.Context(), limit, ratelimit.Address(from))
}

// Admit has next answer requests of an address that does not have as many under way
// as it may. This machine's own have no bound.
func (a *API) Admit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if from := a.clientAddress(r); from.IsValid() && !a.trusted(from) {
			leave, err := a.Crowd.EnterFrom(ratelimit.Address(from))
			if err != nil {
				a.Fail(w, r, err)
				return
			}
			defer leave()
		}
		next.ServeHTTP(w, r)
	})
}

// clientAddress returns whose address a request comes from. What
// X-Forwarded-For says is believed of proxies alone: of this machine's, and
// of those that the configuration names.
func (a *API) clientAddress(r *http.Request) netip.Addr {
	var from netip.Addr
	local := true
	if peer, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		from = peer.Addr().Unmap()
		local = a.trusted(from)
	}
	if !local {
		return from
	}
	hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for i := len(hops) - 1; i >= 0; i-- {
		hop, err := netip.ParseAddr(strings.TrimSpace(hops[i]))
		if err != nil {
			break
		}
		from = hop.Unmap()
		if !a.trusted(from) {
			break
		}
	}
	return from
}

// addressText is clientAddress as text; empty: this machine's, by a socket.
func (a *API) addressText(r *http.Request) string {
	if from := a.clientAddress(r); from.IsValid() {
		return from.String()
	}
	return ""
}

func (a *API) trusted(from netip.Addr) bool {
	if from.IsLoopback() {
		return true
	}
	for _, p := range a.TrustedProxies {
		if p.Contains(from) {
			return true
		}
	}
	return false
}
