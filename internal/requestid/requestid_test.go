package requestid

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestTake(t *testing.T) {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	a, b := take(r), take(r)
	if len(a) != 16 || a == b || !valid(a, 16) {
		t.Errorf("new ids: %q, %q", a, b)
	}
	long := strings.Repeat("x", maxLength)
	for given, want := range map[string]string{"front-door_1": "ext-front-door_1", long: "ext-" + long, long + "x": "", "not fit\tfor a log": "", "ext-": "ext-ext-", "ä": ""} {
		r.Header.Set(Header, given)
		if got := take(r); want != "" && got != want || want == "" && len(got) != 16 {
			t.Errorf("%q: %q", given, got)
		}
	}
}

// TestPass checks that a valid id passes from program to program, and an invalid one does
// not.
func TestPass(t *testing.T) {
	const field = "X-Wrenn-Request-Id"
	ctx, h := With(t.Context(), "ext-1"), http.Header{}
	Pass(ctx, h, field)
	if got := From(Received(t.Context(), h, field)); got != "ext-1" || len(h) != 0 {
		t.Errorf("it received %q, and left %v", got, h)
	}
	Pass(t.Context(), h, field)
	if len(h) != 0 {
		t.Errorf("it passed %v", h)
	}
	for _, wrong := range []string{"a b", "a\nb", strings.Repeat("x", 200)} {
		h.Set(field, wrong)
		if got := From(Received(t.Context(), h, field)); got != "" || len(h) != 0 {
			t.Errorf("%q: it received %q, and left %v", wrong, got, h)
		}
	}
	var seen string
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen = r.Header.Get(Header) }))
	defer s.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: Transport{http.DefaultTransport}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if seen != "ext-1" || len(req.Header) != 0 {
		t.Errorf("the other end saw %q; the request now has %v", seen, req.Header)
	}
}
