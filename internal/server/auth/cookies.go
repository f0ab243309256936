package auth

import "strings"

const (
	// cookiePrefix begins the names of the service's cookies.
	cookiePrefix = "wrenn_"
	// hostPrefix makes a browser bind a cookie to the very host that set it, over
	// HTTPS: no other host of the domain can set or replace it.
	hostPrefix = "__Host-"
)

// Cookie returns the name of one of the service's cookies. It is bound to the
// host if secure is set, which browsers take over HTTPS alone: Safari does so on
// loopback names too.
func Cookie(name string, secure bool) string {
	if secure {
		return hostPrefix + cookiePrefix + name
	}
	return cookiePrefix + name
}

// IsCookie reports whether a cookie's name is one of the service's, which no guest
// may get. Browsers compare the prefix without regard to case.
func IsCookie(name string) bool {
	name = strings.ToLower(name)
	name = strings.TrimPrefix(name, strings.ToLower(hostPrefix))
	return strings.HasPrefix(name, cookiePrefix)
}
