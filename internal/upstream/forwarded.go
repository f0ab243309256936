package upstream

import (
	"net/http"
	"net/netip"
)

// ProtoField is the request field in which a proxy says how it received a request.
const ProtoField = "X-Forwarded-Proto"

// TLSBefore reports whether a program on this machine sent the request and says that
// it received it over TLS. It does not believe programs on other machines.
func TLSBefore(r *http.Request) bool {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && peer.Addr().Unmap().IsLoopback() && r.Header.Get(ProtoField) == "https"
}
