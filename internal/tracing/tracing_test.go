package tracing

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/requestid"
)

// sink is a collector that keeps what it gets.
type sink struct {
	*httptest.Server
	mu     sync.Mutex
	spans  []*tracepb.Span
	header http.Header
	status []int // of the next responses
	asked  int
}

func newSink(t *testing.T, status ...int) *sink {
	s := &sink{status: status}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.URL.Path != "/v1/traces" {
			t.Errorf("%s: %v", r.URL, err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.asked++; s.asked <= len(s.status) {
			w.WriteHeader(s.status[s.asked-1])
			return
		}
		var data tracepb.TracesData
		if err := proto.Unmarshal(body, &data); err != nil {
			t.Error(err)
		}
		s.header = r.Header
		for _, resource := range data.GetResourceSpans() {
			for _, scope := range resource.GetScopeSpans() {
				s.spans = append(s.spans, scope.GetSpans()...)
			}
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func open(t *testing.T, s Settings) *Tracer {
	t.Helper()
	tracer, err := Open(s, "server", "test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return tracer
}

// closed closes the tracer and returns the spans that the sink got, by name.
func (s *sink) closed(t *testing.T, tracer *Tracer) map[string]*tracepb.Span {
	t.Helper()
	if err := tracer.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[string]*tracepb.Span{}
	for _, span := range s.spans {
		all[span.GetName()] = span
	}
	return all
}

// TestOff checks that without a collector nothing is allocated and nothing runs.
func TestOff(t *testing.T) {
	before := runtime.NumGoroutine()
	off := open(t, Settings{Ratio: 1})
	if off != nil || runtime.NumGoroutine() != before {
		t.Fatalf("a tracer without a collector: %v", off)
	}
	next := http.NewServeMux()
	if off.Handler(next) != http.Handler(next) || off.Close(t.Context()) != nil {
		t.Error("the handler was replaced")
	}
	ctx := requestid.With(t.Context(), "1")
	h := http.Header{}
	failed := errors.New("failed")
	allocated := testing.AllocsPerRun(100, func() {
		ctx, span := Start(ctx, "a")
		ctx, step := Step(ctx, "a", "b")
		ctx, more := off.Continue(ctx, h.Get(hostwire.Trace), "c")
		Pass(ctx, h, hostwire.Trace)
		Of(ctx).Set("x", "y")
		more.SetInt("x", 1)
		step.EndWith(failed)
		span.End()
		if Carry(ctx, ctx) != ctx || Parent(ctx) != "" {
			t.Error("the request carries a trace")
		}
	})
	if allocated != 0 || len(h) != 0 {
		t.Errorf("%v allocations, header %v", allocated, h)
	}
}

func BenchmarkOff(b *testing.B) {
	ctx := requestid.With(b.Context(), "1")
	b.ReportAllocs()
	for b.Loop() {
		ctx, span := Step(ctx, "a", "b")
		Of(ctx).SetInt("x", 1)
		span.End()
	}
}

// TestTrace checks that a request's trace passes through the programs, and includes the
// guest's part.
func TestTrace(t *testing.T) {
	s := newSink(t, http.StatusServiceUnavailable)
	server, agent := open(t, Settings{Endpoint: s.URL, Ratio: 1, Headers: "authorization=Basic%20x, other = y"}), open(t, Settings{Endpoint: s.URL + "/"})
	guest := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get(hostwire.Timing) == "" || r.Header.Get("Traceparent") != "" {
			t.Errorf("the guest gets %v", r.Header)
		}
		w.Header().Set(hostwire.Timing, "dur=999999")
	}))
	defer guest.Close()
	h := http.Header{}
	requestid.Handler(server.Handler(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		Of(r.Context()).Name("POST /v1/x")
		ctx, span := Step(Carry(r.Context(), context.Background()), "create", "host")
		Pass(ctx, h, hostwire.Trace)
		span.End()
	}))).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/v1/x", nil))
	ctx, span := agent.Continue(t.Context(), h.Get(hostwire.Trace), "Create")
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, guest.URL+"/init?path=secret", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: GuestTransport{http.DefaultTransport}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	span.Fail("unavailable")
	span.End()
	if len(req.Header) != 0 {
		t.Errorf("the caller's request has changed: %v", req.Header)
	}
	s.closed(t, agent)
	all := s.closed(t, server)
	var parent []byte
	for _, name := range []string{"POST /v1/x", "create: host", "Create", "guest /init", "in the guest"} {
		is := all[name]
		if is == nil || string(is.GetParentSpanId()) != string(parent) || string(is.GetTraceId()) != string(all["POST /v1/x"].GetTraceId()) {
			t.Fatalf("%s: %v", name, is)
		}
		parent = is.GetSpanId()
	}
	// The guest claims more time than the call took.
	in, call := all["in the guest"], all["guest /init"]
	if in.GetStartTimeUnixNano() < call.GetStartTimeUnixNano() || in.GetEndTimeUnixNano() > call.GetEndTimeUnixNano() {
		t.Errorf("the guest's part %v is not within the call %v", in, call)
	}
	if all["Create"].GetStatus().GetCode() != tracepb.Status_STATUS_CODE_ERROR || !strings.Contains(all["POST /v1/x"].String(), "wrenn.request_id") {
		t.Errorf("spans %v, %v", all["Create"], all["POST /v1/x"])
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.header.Get("Authorization") != "Basic x" || s.header.Get("Other") != "y" || s.header.Get("Content-Type") != "application/x-protobuf" {
		t.Errorf("the collector got %v", s.header)
	}
}

// TestClientDoesNotDecide checks that a client's headers neither start a trace nor
// continue the client's own.
func TestClientDoesNotDecide(t *testing.T) {
	const theirs = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	request := func(tracer *Tracer) (traced bool) {
		r := httptest.NewRequest(http.MethodGet, "/v1/x", nil)
		r.Header.Set("Traceparent", theirs)
		r.Header.Set("Tracestate", "evil=1")
		r.Header.Set(hostwire.Trace, theirs)
		tracer.Handler(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { traced = Recording(r.Context()) })).ServeHTTP(httptest.NewRecorder(), r)
		return traced
	}
	s := newSink(t)
	never := open(t, Settings{Endpoint: s.URL, Ratio: 0})
	for range 100 {
		if request(never) {
			t.Fatal("a client's header started a trace")
		}
	}
	if all := s.closed(t, never); len(all) != 0 {
		t.Errorf("spans %v", all)
	}
	always := open(t, Settings{Endpoint: s.URL, Ratio: 1})
	n := 0
	for range 50 * mostPerSecond {
		if request(always) {
			n++
		}
	}
	// The limit admits one more for each 10 ms that this took.
	if n < mostPerSecond || n == 50*mostPerSecond {
		t.Errorf("%d requests are traced", n)
	}
	span := s.closed(t, always)["request"]
	if span == nil || len(span.GetLinks()) != 1 || len(span.GetParentSpanId()) != 0 {
		t.Fatalf("span %v", span)
	}
	link := span.GetLinks()[0]
	if link.GetTraceState() != "" || string(link.GetTraceId()) == string(span.GetTraceId()) || !strings.Contains(link.String(), "wrenn.from_client") {
		t.Errorf("link %v of %v", link, span)
	}
}

func TestGuestTook(t *testing.T) {
	for said, want := range map[string]time.Duration{
		"dur=1.5": 1500 * time.Microsecond, "dur=0": 0, "": -1, "dur=": -1, "dur=-1": -1, "dur=NaN": -1, "dur=Inf": -1, "dur=1e300": -1, "1": -1, "dur=" + strings.Repeat("1", 40): -1,
	} {
		got, ok := guestTook(http.Header{hostwire.Timing: {said}})
		if ok != (want >= 0) || ok && got != want {
			t.Errorf("%q: %v, %v", said, got, ok)
		}
	}
}

// TestCollectorFails checks that a collector that accepts nothing blocks nobody, and is
// logged once.
func TestCollectorFails(t *testing.T) {
	s := newSink(t, 400, 400, 400, 400)
	var log strings.Builder
	c, err := newCollector(s.URL, map[string]string{"authorization": "secret"}, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		if err := c.UploadTraces(t.Context(), nil); err == nil {
			t.Error("sent")
		}
	}
	if err := c.UploadTraces(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if strings.Count(log.String(), "traces are lost") != 1 || strings.Count(log.String(), "again") != 1 || strings.Contains(log.String(), "secret") {
		t.Errorf("log:\n%s", &log)
	}
	s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := c.UploadTraces(ctx, nil); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("a collector that is down: %v", err)
	}
}

func TestSettings(t *testing.T) {
	for want, s := range map[string]Settings{
		"OTEL_TRACES_SAMPLER_ARG": {Endpoint: "http://x", Ratio: 2}, "OTEL_EXPORTER_OTLP_ENDPOINT": {Endpoint: "localhost:4318"},
		"OTEL_EXPORTER_OTLP_ENDPOINT: credentials": {Endpoint: "http://user:secret@x"},
		"OTEL_EXPORTER_OTLP_HEADERS":               {Endpoint: "http://x", Headers: "secret"}, "OTEL_RESOURCE_ATTRIBUTES": {Endpoint: "http://x", Attributes: "a=%zz"},
	} {
		_, err := Open(s, "server", "", slog.Default())
		if err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%+v: %v", s, err)
		}
	}
}
