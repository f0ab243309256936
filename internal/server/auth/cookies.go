package auth

import "strings"

const (
	// cookiePrefix begins the names of the service's cookies.
	cookiePrefix = "wrenn_"
	// hostPrefix makes a browser bind a cookie to the very host that set it, over
	// HTTPS: no other host of the domain can set or replace it.
	hostPrefix = "__Host-"
)

// Cookie returns the full name of one of the service's cookies. If secure, the name
// binds the cookie to its host. Browsers accept such a cookie only over HTTPS; Safari
// makes no exception for loopback names.
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
