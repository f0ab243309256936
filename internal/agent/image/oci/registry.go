package oci

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	remotetransport "github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// Access has the credentials and restrictions for requests to a registry. The zero Access
// is anonymous.
type Access struct {
	Username, Password string
	// Keychain makes requests without a username use the credentials for the registry in
	// Docker's configuration of this process's user.
	Keychain bool
	// Loopback allows registries on this machine, over plain HTTP. Only the machine's owner
	// may set it, because it allows requests to any service on loopback.
	Loopback bool
	// Private allows registries in private networks. Whoever may name an image can then
	// send requests to any service there.
	Private bool
}

// Registry resolves an image reference. It uses TLS for every registry except those on
// this machine, redirects included. ctx must last until the image was fetched.
func Registry(ctx context.Context, reference string, access Access) (*Image, error) {
	_, img, err := pull(ctx, reference, access)
	if err != nil {
		return nil, fmt.Errorf("image %.200s: %w", reference, err)
	}
	return img, nil
}

// Pin returns the reference with the present digest of the image's manifest in place of
// the tag. It returns the same errors as [Registry].
func Pin(ctx context.Context, reference string, access Access) (string, error) {
	ref, img, err := pull(ctx, reference, access)
	if err != nil {
		return "", fmt.Errorf("image %.200s: %w", reference, err)
	}
	digest, err := img.img.Digest()
	if err := errors.Join(err, img.Close()); err != nil {
		return "", fmt.Errorf("image %.200s: %w", reference, err)
	}
	return ref.Context().Digest(digest.String()).Name(), nil
}

func pull(ctx context.Context, reference string, access Access) (name.Reference, *Image, error) {
	ref, err := name.ParseReference(reference)
	if err != nil {
		return nil, nil, Refuse(err, "its reference is malformed")
	}
	auth := authn.Anonymous
	switch {
	case access.Username != "":
		auth = &authn.Basic{Username: access.Username, Password: access.Password}
	case access.Keychain:
		if auth, err = authn.DefaultKeychain.Resolve(ref.Context()); err != nil {
			return nil, nil, fmt.Errorf("read credentials: %w", err)
		}
	}
	transport := newTransport(netaddr.Policy{Loopback: access.Loopback, Private: access.Private})
	found, err := remote.Image(
		ref, remote.WithContext(ctx), remote.WithAuth(auth), remote.WithTransport(transport),
		remote.WithPlatform(v1.Platform{OS: platformOS, Architecture: platformArch}),
	)
	if err != nil {
		transport.base.CloseIdleConnections()
		return nil, nil, answered(err)
	}
	img, err := newImage(found, func() error { transport.base.CloseIdleConnections(); return nil })
	return ref, img, err
}

// The errors of registries that tenants may see: these, [ErrSlow] and [NoRegistry]. Others
// would reveal what is at an address that they cannot reach themselves.
var (
	ErrDenied   = clienterr.New("the registry denies access with these credentials")
	ErrNotFound = clienterr.New("the registry does not have this image")
)

// NoRegistry returns err with the text for clients of all other failures, such as an unknown
// name, no response, or one that is not a registry's. The log has err.
func NoRegistry(err error) error {
	return clienterr.Because(err, "the registry did not answer as a registry should")
}

// answered converts a registry's error response. Its text is only for the log, because
// another service may have responded.
func answered(err error) error {
	var e *remotetransport.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return ErrDenied
	case http.StatusNotFound:
		return ErrNotFound
	}
	return NoRegistry(err)
}

// transport sends requests only to addresses that a registry may have, whatever a name, a
// redirect or a layer's URL leads to.
type transport struct {
	base     *http.Transport
	loopback bool
	pace     pace
}

func newTransport(p netaddr.Policy) *transport {
	dialer := &net.Dialer{Timeout: 30 * time.Second, Control: p.Control}
	return &transport{loopback: p.Loopback, pace: defaultPace, base: &http.Transport{
		DialContext: dialer.DialContext, ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute,
		TLSHandshakeTimeout: 30 * time.Second, ResponseHeaderTimeout: time.Minute, MaxResponseHeaderBytes: 1 << 20,
	}}
}

func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(r.Context())
	resp, err := t.base.RoundTrip(t.secured(r.WithContext(ctx)))
	if err != nil {
		cancel(nil)
		return nil, err
	}
	return t.pace.bound(resp, cancel), nil
}

// secured returns the request with https, unless the policy allows plain HTTP for it.
func (t *transport) secured(r *http.Request) *http.Request {
	if r.URL.Scheme == "https" || t.loopback && isLoopback(r.URL.Hostname()) {
		return r
	}
	r = r.Clone(r.Context())
	r.URL.Scheme = "https"
	return r
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}
