package proxy

import (
	"net/http"
	"slices"
	"strings"

	"github.com/wrenn-dev/wrenn/internal/server/auth"
)

// daemonFields is the only response fields of envd that clients get. Browsers may apply
// other fields to a whole site, now or in the future.
var daemonFields = fieldSet(
	"Accept-Encoding", "Accept-Post", "Accept-Ranges", "Allow", "Cache-Control", "Content-Disposition", "Content-Encoding",
	"Content-Length", "Content-Range", "Content-Type", "Date", "Etag", "Last-Modified", "Retry-After", "Vary",
	"Connect-Accept-Encoding", "Connect-Content-Encoding", "Connect-Protocol-Version",
	"Grpc-Accept-Encoding", "Grpc-Encoding", "Grpc-Message", "Grpc-Status", "Grpc-Status-Details-Bin",
)

// portFields is the response fields that no port may send, because they affect other host
// names in browsers, or the front door's connections.
var portFields = fieldSet("Alt-Svc", "Clear-Site-Data", "Set-Cookie2")

func fieldSet(names ...string) map[string]bool {
	set := make(map[string]bool, len(names))
	for _, name := range names {
		set[http.CanonicalHeaderKey(name)] = true
	}
	return set
}

// filterDaemon removes the fields that clients must not get from envd's response header.
func filterDaemon(h http.Header) {
	for name := range h {
		if !daemonFields[name] {
			delete(h, name)
		}
	}
}

// confine makes browsers treat envd's response at most as a document without scripts,
// subresources and an origin.
func confine(resp *http.Response) {
	h := resp.Header
	if _, ok := h["Content-Type"]; !ok {
		// Otherwise servers guess a type.
		h["Content-Type"] = []string{"application/octet-stream"}
	}
	h["X-Content-Type-Options"] = []string{"nosniff"}
	h["Content-Security-Policy"] = []string{"default-src 'none'; style-src 'unsafe-inline'; sandbox"}
	h["Referrer-Policy"] = []string{"no-referrer"}
}

// allowPages lets pages of every site read a response to a signed URL. Browsers send
// neither cookies nor tokens with what "*" allows, so the signature is all that counts.
func allowPages(h http.Header) {
	h["Access-Control-Allow-Origin"] = []string{"*"}
	h["Access-Control-Allow-Methods"] = []string{"GET, HEAD, POST"}
	h["Access-Control-Allow-Headers"] = []string{"Content-Type, Range"}
	h["Access-Control-Expose-Headers"] = []string{"*"}
	h["Access-Control-Max-Age"] = []string{"600"}
}

// filterPort returns a filter of the response headers of the port whose name is
// host. A guest's cookies are only for that name.
func filterPort(host string) func(http.Header) {
	return func(h http.Header) {
		for name := range h {
			if portFields[name] {
				delete(h, name)
			}
		}
		cookies, ok := h["Set-Cookie"]
		if !ok {
			return
		}
		own := make([]string, len(cookies))
		for i, c := range cookies {
			own[i] = ownCookie(c, host)
		}
		h["Set-Cookie"] = own
	}
}

// ownCookie removes every Domain other than host from the value of a Set-Cookie field,
// so that the cookie is only for host.
func ownCookie(cookie, host string) string {
	parts := strings.Split(cookie, ";")
	return strings.Join(append(parts[:1], slices.DeleteFunc(parts[1:], func(part string) bool {
		name, value, _ := strings.Cut(part, "=")
		domain := strings.TrimPrefix(strings.Trim(value, " \t"), ".")
		return strings.EqualFold(strings.Trim(name, " \t"), "Domain") && !strings.EqualFold(domain, host)
	})...), ";")
}

// dropOurCookies removes the service's own cookies from a request's header.
func dropOurCookies(h http.Header) {
	fields, ok := h["Cookie"]
	if !ok {
		return
	}
	var kept []string
	for _, field := range fields {
		others := slices.DeleteFunc(strings.Split(field, ";"), func(pair string) bool {
			name, _, _ := strings.Cut(pair, "=")
			return auth.IsCookie(strings.Trim(name, " \t"))
		})
		if len(others) > 0 {
			kept = append(kept, strings.TrimLeft(strings.Join(others, ";"), " \t"))
		}
	}
	if h["Cookie"] = kept; len(kept) == 0 {
		delete(h, "Cookie")
	}
}
