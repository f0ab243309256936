package rest

import (
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/getkin/kin-openapi/openapi3"

	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
)

// Rate limits per address for operations without authentication.
var (
	limitPublic = ratelimit.Limit{Name: "public", Burst: 600, Per: time.Minute}
	limitLogin  = ratelimit.Limit{Name: "login", Burst: 30, Per: time.Minute}
	// Many hosts may be behind one address.
	limitHosts = ratelimit.Limit{Name: "hosts", Burst: 12000, Per: time.Minute}
)

// admit applies the rate limit of an address to an operation without authentication.
func (a *API) admit(r *http.Request, op *openapi3.Operation) error {
	from := a.clientAddress(r)
	if !from.IsValid() {
		return nil // A local client on a Unix socket, without the front door.
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

// BoundAddresses wraps next with a limit on each address's requests in flight. Trusted
// addresses, such as loopback, have none.
func (a *API) BoundAddresses(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if from := a.clientAddress(r); from.IsValid() && !a.trusted(from) {
			leave, err := a.InFlight.EnterFrom(ratelimit.Address(from))
			if err != nil {
				a.Fail(w, r, err)
				return
			}
			defer leave()
		}
		next.ServeHTTP(w, r)
	})
}

// clientAddress returns the client's address. It trusts X-Forwarded-For only from proxies
// on this machine and from the configured ones.
func (a *API) clientAddress(r *http.Request) netip.Addr {
	from, believed := a.peer(r)
	if !believed {
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

// peer returns the address that a request comes from directly (none for a Unix
// socket), and whether to trust what that address says about the client.
func (a *API) peer(r *http.Request) (from netip.Addr, believed bool) {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}, true
	}
	from = peer.Addr().Unmap()
	return from, a.trusted(from)
}

// checkPrivate refuses operations on accounts, including those of mailed links, over
// plain HTTP, which others can read, unless the request is for a loopback name.
func (a *API) checkPrivate(r *http.Request, op *openapi3.Operation) error {
	account := op.Tags[0] == "login" || op.Tags[0] == "me"
	if !account || a.Insecure || a.encrypted(r) || netaddr.LoopbackName(r.Host) {
		return nil
	}
	return fault.New(fault.PermissionDenied, "passwords, sessions and mailed links must not go over plain HTTP: use HTTPS, or a loopback name such as localhost. If you do use HTTPS, the operator must name the proxy that terminates it in WRENN_TRUSTED_PROXIES, or set WRENN_INSECURE")
}

// encrypted reports whether the client sent the request over HTTPS.
func (a *API) encrypted(r *http.Request) bool {
	if r.TLS != nil {
		return true
	}
	if _, believed := a.peer(r); !believed {
		return false
	}
	hops := r.Header.Values("X-Forwarded-Proto")
	return len(hops) > 0 && !slices.ContainsFunc(strings.Split(strings.Join(hops, ","), ","), func(hop string) bool {
		return !strings.EqualFold(strings.TrimSpace(hop), "https")
	})
}

// addressText returns clientAddress as text; empty for a Unix socket.
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
