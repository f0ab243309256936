// Package requestid passes the id of a client's request to each program that works on it,
// so that their logs can be correlated.
package requestid

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net/http"
)

// Header is the header field for the id in clients' requests and in responses to them.
const Header = "X-Request-Id"

// outside is the prefix of ids that clients chose, so that a client cannot imitate
// another request's id in the log and in audit records.
const outside = "ext-"

// maxLength bounds an id that a client chose, in bytes, without [outside].
const maxLength = 64

// take returns the id that the client chose, with the prefix outside, or a new one.
func take(r *http.Request) string {
	if given := r.Header.Get(Header); valid(given, maxLength) {
		return outside + given
	}
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

func valid(id string, most int) bool {
	ok := id != "" && len(id) <= most
	for _, c := range []byte(id) {
		ok = ok && (c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '_')
	}
	return ok
}

type key struct{}

// With returns a copy of ctx with the id of a request.
func With(ctx context.Context, id string) context.Context { return context.WithValue(ctx, key{}, id) }

// From returns the id in ctx, or "".
func From(ctx context.Context) string {
	id, _ := ctx.Value(key{}).(string)
	return id
}

// Handler gives each client's request an id and puts it into the context for next.
func Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(With(r.Context(), take(r))))
	})
}

// Pass sets the field name of h to the id in ctx, if there is one.
func Pass(ctx context.Context, h http.Header, name string) {
	if id := From(ctx); id != "" {
		h.Set(name, id)
	}
}

// Received returns a context with the id that another program of Wrenn passed in the
// field name of h, and removes the field.
func Received(ctx context.Context, h http.Header, name string) context.Context {
	id := h.Get(name)
	h.Del(name)
	if !valid(id, len(outside)+maxLength) {
		return ctx
	}
	return With(ctx, id)
}

// Transport is an [http.RoundTripper] that sends the id in a request's context, if there
// is one, in [Header].
type Transport struct{ Next http.RoundTripper }

// RoundTrip implements [http.RoundTripper].
func (t Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if From(r.Context()) != "" {
		r = r.Clone(r.Context())
		Pass(r.Context(), r.Header, Header)
	}
	return t.Next.RoundTrip(r)
}
