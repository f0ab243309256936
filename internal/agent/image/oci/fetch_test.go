package oci

import (
	"errors"
	"io"
	"log"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// TestSlowRegistry checks that a body that stalls or trickles fails, and that one that
// arrives in time does not.
func TestSlowRegistry(t *testing.T) {
	stop := make(chan struct{})
	defer close(stop)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/quick" {
			_, _ = w.Write(make([]byte, 1<<20))
			return
		}
		for {
			_, _ = w.Write([]byte("x"))
			_ = http.NewResponseController(w).Flush()
			var again <-chan time.Time
			if r.URL.Path == "/trickle" {
				again = time.After(time.Millisecond) // real time: the rate of the body
			}
			select {
			case <-again:
			case <-stop:
				return
			case <-r.Context().Done():
				return
			}
		}
	}))
	defer web.Close()
	tr := newTransport(netaddr.Policy{Loopback: true})
	defer tr.base.CloseIdleConnections()
	for path, want := range map[string]error{"/quick": nil, "/stops": ErrSlow, "/trickle": ErrSlow} {
		tr.pace = pace{grace: 100 * time.Millisecond, rate: 1 << 20}
		if want == nil {
			tr.pace.grace = await.Hang
		}
		req, err := http.NewRequestWithContext(await.Context(t), http.MethodGet, web.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(resp.Body); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
		resp.Body.Close()
	}
}

// TestFetch unpacks a fetched image, and checks that Fetch requests nothing larger than
// allowed.
func TestFetch(t *testing.T) {
	needRoot(t)
	img := ofLayers(t, []entry{file("a", "one")}, []entry{file("b", "two")})
	if err := img.Fetch(t.Context(), t.TempDir(), Limits{Bytes: img.Packed() - 1}); !errors.Is(err, ErrRefused) {
		t.Errorf("an image that is too large: %v", err)
	}
	if err := img.Fetch(t.Context(), t.TempDir(), Limits{}); err != nil {
		t.Fatal(err)
	}
	root := t.TempDir() + "/root"
	if err := img.Unpack(t.Context(), root, Limits{}); err != nil {
		t.Fatal(err)
	}
	want := describeTree(t, root)
	again := t.TempDir() + "/root"
	if err := ofLayers(t, []entry{file("a", "one")}, []entry{file("b", "two")}).Unpack(t.Context(), again, Limits{}); err != nil {
		t.Fatal(err)
	}
	if got := describeTree(t, again); len(want) != 3 || got[1] != want[1] || got[2] != want[2] {
		t.Errorf("%q, want %q", want, got)
	}
}

// claiming is an image whose manifest claims other sizes for its layers.
type claiming struct {
	v1.Image
	sizes []int64
}

// Manifest implements [v1.Image].
func (c claiming) Manifest() (*v1.Manifest, error) {
	m, err := c.Image.Manifest()
	if err != nil {
		return nil, err
	}
	m = m.DeepCopy()
	for n, size := range c.sizes {
		m.Layers[n].Size = size
	}
	return m, nil
}

// TestClaimedSizes checks that sizes which would make an image look smaller than it is
// are refused, because the manifest's sizes bound what a registry may send.
func TestClaimedSizes(t *testing.T) {
	img := ofLayers(t, []entry{file("a", "one")}, []entry{file("b", "two")}).img
	for _, sizes := range [][]int64{{-1, 1}, {math.MaxInt64, 1}, {1 << 62, 1 << 62}} {
		if _, err := newImage(claiming{img, sizes}, func() error { return nil }); !errors.Is(err, ErrRefused) {
			t.Errorf("layers of %d bytes: %v", sizes, err)
		}
	}
	if _, err := newImage(claiming{img, []int64{0, math.MaxInt64}}, func() error { return nil }); err != nil {
		t.Error(err)
	}
}

// TestRegistrySendsElsewhere checks that the agent connects only to addresses that its
// policy allows, although a registry refers it to others in every way that the protocol has.
func TestRegistrySendsElsewhere(t *testing.T) {
	// The library itself refuses plainer forms of these two addresses.
	const guest, cloud = "https://[64:ff9b::10.11.0.7]:8443/x", "https://[64:ff9b::169.254.169.254]/latest"
	real := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	img, err := random.Image(100, 1)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	layer, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	says, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	says.OS, says.Architecture = platformOS, platformArch
	if img, err = mutate.ConfigFile(img, says); err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	var intercept func(w http.ResponseWriter, r *http.Request) bool
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if intercept == nil || !intercept(w, r) {
			real.ServeHTTP(w, r)
		}
	}))
	defer web.Close()
	reference := strings.TrimPrefix(web.URL, "http://") + "/x:1"
	ref, err := name.ParseReference(reference)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	fetch := func() error {
		img, err := Registry(t.Context(), reference, Access{Loopback: true, Private: true})
		if err != nil {
			return err
		}
		defer img.Close()
		return img.Fetch(t.Context(), t.TempDir(), Limits{})
	}
	if err := fetch(); err != nil {
		t.Fatal(err)
	}
	redirect := func(path, to string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != path {
				return false
			}
			http.Redirect(w, r, to, http.StatusTemporaryRedirect)
			return true
		}
	}
	for what, how := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"the API": redirect("/v2/", cloud), "the manifest": redirect("/v2/x/manifests/1", guest),
		"the configuration": redirect("/v2/x/blobs/"+config.String(), cloud), "a layer": redirect("/v2/x/blobs/"+layer.String(), guest),
		"tokens": func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+guest+`",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		},
	} {
		intercept = how
		if err := fetch(); !errors.Is(err, netaddr.ErrNotAllowed) {
			t.Errorf("%s elsewhere: %v", what, err)
		}
	}
}
