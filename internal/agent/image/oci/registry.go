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

	"github.com/wrenn-dev/wrenn/internal/agent/told"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// Access says how a registry is asked. The zero Access asks as nobody.
type Access struct {
	Username, Password string
	// Keychain: without a username, use the credentials that this process's
	// user has for the registry in Docker's configuration.
	Keychain bool
	// Loopback allows a registry on this machine, which is asked over plain
	// HTTP. Who is not the machine's owner must not have it: they could ask
	// whatever listens there.
	Loopback bool
	// Private allows registries in private networks. Whoever may name an image
	// can then ask whatever listens there.
	Private bool
}

// Registry finds an image in a registry. All others than those on this
// machine are asked over TLS, wherever they send the request on to. ctx bounds
// also what Image does.
func Registry(ctx context.Context, reference string, access Access) (*Image, error) {
	_, img, err := pull(ctx, reference, access)
	if err != nil {
		return nil, fmt.Errorf("image %.200s: %w", reference, err)
	}
	return img, nil
}

// Pin returns what a reference means at this moment: the same, with the digest
// of the image's manifest in the place of its tag. Its errors are Registry's.
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

// What tenants hear of a registry: these, [ErrSlow], and [NoRegistry]. Anything else would
// tell them what there is at an address that they cannot reach themselves.
var (
	ErrDenied   = told.New("the registry lets nobody with these credentials read it")
	ErrNotFound = told.New("the registry does not have it")
)

// NoRegistry returns err with the text for clients of every failure that has no text of its
// own: no such name, no answer, or another than a registry's. The log has err.
func NoRegistry(err error) error {
	return told.Because(err, "the registry did not answer as a registry should")
}

// answered is what a registry's refusal means. What else it says is for the log: it may
// be something else that answers.
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

// transport lets requests go only where a registry may be: neither names nor
// redirections nor a layer's own addresses lead elsewhere.
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

// secured is the request over TLS, unless it may do without.
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
