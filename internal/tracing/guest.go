package tracing

import (
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// GuestTransport is an [http.RoundTripper] that records calls of the guest daemon until
// the daemon begins to respond. The guest has no tracer: the daemon reports how long it
// took, which counts only up to the duration of the call.
type GuestTransport struct{ Next http.RoundTripper }

// RoundTrip implements [http.RoundTripper].
func (t GuestTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if !Recording(r.Context()) {
		return t.Next.RoundTrip(r)
	}
	begun := time.Now()
	// The daemon's paths are from a fixed set; names of files are in the query.
	ctx, span := start(r.Context(), "guest "+r.URL.Path, trace.WithSpanKind(trace.SpanKindClient), trace.WithTimestamp(begun))
	r = r.Clone(ctx)
	r.Header.Set(hostwire.Timing, "1")
	resp, err := t.Next.RoundTrip(r)
	if err != nil {
		span.EndWith(err)
		return resp, err
	}
	ended := time.Now()
	span.SetInt("http.response.status_code", resp.StatusCode)
	if resp.StatusCode >= 400 {
		span.Fail(strconv.Itoa(resp.StatusCode))
	}
	if took, ok := guestTook(resp.Header); ok {
		// The guest's clock can be wrong, so only the duration comes from the guest.
		since := ended.Add(-took)
		if since.UnixNano() < begun.UnixNano() { // a span has the wall clock's time
			since = begun
		}
		_, inside := start(ctx, "in the guest", trace.WithTimestamp(since), trace.WithAttributes(attribute.Bool("wrenn.from_guest", true)))
		inside.span.End(trace.WithTimestamp(ended))
	}
	span.span.End(trace.WithTimestamp(ended))
	return resp, nil
}

// guestTook parses the duration that a guest reports. The guest is not trusted.
func guestTook(h http.Header) (time.Duration, bool) {
	text, ok := strings.CutPrefix(h.Get(hostwire.Timing), "dur=")
	if !ok || len(text) > 32 {
		return 0, false
	}
	ms, err := strconv.ParseFloat(text, 64)
	if err != nil || !(ms >= 0 && ms < math.MaxInt32) {
		return 0, false
	}
	return time.Duration(ms * float64(time.Millisecond)), true
}
