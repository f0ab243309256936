package server

import (
	"net/http"
	"strings"

	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// FrontDoor returns the handler for client connections that Caddy hands over to this
// server. It routes requests to next as deploy/Caddyfile does, and removes the header
// fields that only a front door may set.
func FrontDoor(next http.Handler, toPort func(*http.Request) bool) http.Handler {
	const prefix = "/api"
	api := http.StripPrefix(prefix, next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		before := upstream.TLSBefore(r)
		for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
			r.Header.Del(name)
		}
		if before {
			r.Header.Set(upstream.ProtoField, "https")
		}
		switch {
		case toPort(r):
			next.ServeHTTP(w, r)
		case strings.HasPrefix(r.URL.EscapedPath(), prefix+"/"):
			api.ServeHTTP(w, r)
		case r.URL.Path == "/":
			w.Header().Set("Location", "/docs")
			w.WriteHeader(http.StatusFound)
		default:
			next.ServeHTTP(w, r)
		}
	})
}
