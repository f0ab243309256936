// Package tracing records OpenTelemetry spans of what server, agent and guest do for a
// request. If nothing is recorded, its functions allocate nothing and start nothing.
//
// The server samples clients' requests at random; a client cannot influence that. All
// work for a sampled request is recorded, also in other programs, and nothing else is.
package tracing

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/time/rate"

	"github.com/wrenn-dev/wrenn/internal/requestid"
)

// Settings configure the traces of a program. Their names are OpenTelemetry's.
type Settings struct {
	Endpoint   string  `env:"OTEL_EXPORTER_OTLP_ENDPOINT" help:"URL of an OpenTelemetry collector that takes OTLP over HTTP, such as http://localhost:4318; empty: no traces (tracing.md)"`
	Headers    string  `env:"OTEL_EXPORTER_OTLP_HEADERS,unset" help:"headers for the collector, such as credentials: name=value, with commas between them"`
	Ratio      float64 `env:"OTEL_TRACES_SAMPLER_ARG" envDefault:"1" help:"share of clients' requests that are traced, from 0 to 1, at most 100 a second; only the server's counts"`
	Attributes string  `env:"OTEL_RESOURCE_ATTRIBUTES" help:"attributes of all spans, such as deployment.environment.name=production: name=value, with commas between them"`
}

const (
	// mostPerSecond bounds the traces that a program begins, because clients choose how
	// many requests they send, and the operator pays for traces.
	mostPerSecond = 100
	// maxValue bounds a value of an attribute, in bytes.
	maxValue = 256
	library  = "github.com/wrenn-dev/wrenn"
)

// Tracer begins traces, or continues those of other programs. A nil Tracer does neither.
// It is safe for concurrent use.
type Tracer struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
	ratio    float64
	limit    *rate.Limiter
}

// Open returns the tracer of a program, such as "server", or nil if no collector is
// configured. The caller closes it.
func Open(s Settings, program, version string, log *slog.Logger) (*Tracer, error) {
	if s.Endpoint == "" {
		return nil, nil
	}
	if !(s.Ratio >= 0 && s.Ratio <= 1) {
		return nil, errors.New("OTEL_TRACES_SAMPLER_ARG must be from 0 to 1")
	}
	headers, err := pairs(s.Headers)
	if err != nil {
		return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_HEADERS: %w", err)
	}
	c, err := newCollector(s.Endpoint, headers, log)
	if err != nil {
		return nil, err
	}
	more, err := pairs(s.Attributes)
	if err != nil {
		return nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("look up the host's name: %w", err)
	}
	attributes := []attribute.KeyValue{attribute.String("service.version", version), attribute.String("host.name", host)}
	for name, value := range more {
		attributes = append(attributes, attribute.String(name, value))
	}
	attributes = append(attributes, attribute.String("service.namespace", "wrenn"), attribute.String("service.name", "wrenn-"+program))
	exporter, err := otlptrace.New(context.Background(), c)
	if err != nil {
		return nil, fmt.Errorf("open tracer: %w", err)
	}
	// The collector logs its failures itself.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Debug("traces", "error", err) }))
	limits := sdktrace.NewSpanLimits()
	limits.AttributeValueLengthLimit = maxValue
	p := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter), sdktrace.WithSampler(sdktrace.AlwaysSample()), // the sampling is done before a span starts
		sdktrace.WithResource(resource.NewSchemaless(attributes...)), sdktrace.WithRawSpanLimits(limits),
	)
	return &Tracer{provider: p, tracer: p.Tracer(library), ratio: s.Ratio, limit: rate.NewLimiter(mostPerSecond, mostPerSecond)}, nil
}

// pairs parses name=value pairs, separated by commas. Values are percent-encoded.
func pairs(text string) (map[string]string, error) {
	all := map[string]string{}
	for pair := range strings.SplitSeq(text, ",") {
		if strings.TrimSpace(pair) == "" {
			continue
		}
		name, value, ok := strings.Cut(pair, "=")
		if name = strings.TrimSpace(name); !ok || name == "" {
			return nil, errors.New("want name=value, with commas between them") // without the text, which may be a secret
		}
		decoded, err := url.PathUnescape(strings.TrimSpace(value))
		if err != nil {
			return nil, fmt.Errorf("%s: its value is not percent-encoded", name)
		}
		all[name] = decoded
	}
	return all, nil
}

// Close sends the recorded spans, until ctx is done, and stops.
func (t *Tracer) Close(ctx context.Context) error {
	if t == nil {
		return nil
	}
	return t.provider.Shutdown(ctx)
}

// Handler returns a handler that begins a trace for some clients' requests. next names
// the span. A client's traceparent is only recorded as a link: otherwise a tenant could
// have every request traced, or write into another tenant's trace. Without a tracer,
// Handler returns next.
func (t *Tracer) Handler(next http.Handler) http.Handler {
	if t == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/health" || rand.Float64() >= t.ratio || !t.limit.Allow() {
			next.ServeHTTP(w, r)
			return
		}
		options := []trace.SpanStartOption{trace.WithNewRoot(), trace.WithSpanKind(trace.SpanKindServer)}
		given := propagation.TraceContext{}.Extract(context.Background(), propagation.HeaderCarrier(r.Header))
		if c := trace.SpanContextFromContext(given); c.IsValid() {
			link := trace.Link{SpanContext: c.WithTraceState(trace.TraceState{}), Attributes: []attribute.KeyValue{attribute.Bool("wrenn.from_client", true)}}
			options = append(options, trace.WithLinks(link))
		}
		ctx, span := t.tracer.Start(r.Context(), "request", options...)
		defer span.End()
		Span{span}.Set("wrenn.request_id", requestid.From(ctx))
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// Continue begins a child of the span that another program of Wrenn passed (see
// [Parent]), if there is one.
func (t *Tracer) Continue(ctx context.Context, parent, name string) (context.Context, Span) {
	if t == nil || parent == "" {
		return ctx, Span{}
	}
	given := propagation.TraceContext{}.Extract(context.Background(), propagation.MapCarrier{traceparent: parent})
	c := trace.SpanContextFromContext(given)
	if !c.IsSampled() {
		return ctx, Span{}
	}
	ctx, span := t.tracer.Start(trace.ContextWithRemoteSpanContext(ctx, c), name, trace.WithSpanKind(trace.SpanKindServer))
	s := Span{span}
	if id := requestid.From(ctx); id != "" {
		s.Set("wrenn.request_id", id)
	}
	return ctx, s
}

const traceparent = "traceparent"

// Parent returns the span of ctx for another program, or "" if nothing is recorded.
func Parent(ctx context.Context) string {
	if !trace.SpanFromContext(ctx).IsRecording() {
		return ""
	}
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier[traceparent]
}

// Pass sets the field name of h to [Parent], if something is recorded.
func Pass(ctx context.Context, h http.Header, name string) {
	if parent := Parent(ctx); parent != "" {
		h.Set(name, parent)
	}
}

// Carry returns a copy of to with the span of from.
func Carry(from, to context.Context) context.Context {
	span := trace.SpanFromContext(from)
	if !span.IsRecording() {
		return to
	}
	return trace.ContextWithSpan(to, span)
}

// Start begins a child of the span in ctx, if that is recorded. The caller ends it.
func Start(ctx context.Context, name string) (context.Context, Span) {
	return start(ctx, name)
}

// Step begins a child named "operation: step" of the span in ctx, if that is recorded.
func Step(ctx context.Context, operation, step string) (context.Context, Span) {
	if !Recording(ctx) {
		return ctx, Span{}
	}
	return start(ctx, operation+": "+step)
}

// Recording reports whether ctx belongs to a trace that is recorded.
func Recording(ctx context.Context) bool { return trace.SpanFromContext(ctx).IsRecording() }

// Of returns the span in ctx, which the caller must not end.
func Of(ctx context.Context) Span {
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		return Span{span}
	}
	return Span{}
}

func start(ctx context.Context, name string, options ...trace.SpanStartOption) (context.Context, Span) {
	parent := trace.SpanFromContext(ctx)
	if !parent.IsRecording() {
		return ctx, Span{}
	}
	ctx, span := parent.TracerProvider().Tracer(library).Start(ctx, name, options...)
	return ctx, Span{span}
}

// Span is a span. If it is not recorded, its methods do nothing. Names and values must
// not be secrets, commands, environments, paths or contents.
type Span struct{ span trace.Span }

// On reports whether the span is recorded.
func (s Span) On() bool { return s.span != nil }

// Name names the span. Names are from a fixed set.
func (s Span) Name(name string) {
	if s.On() {
		s.span.SetName(name)
	}
}

// Set sets an attribute.
func (s Span) Set(name, value string) {
	if s.On() {
		s.span.SetAttributes(attribute.String(name, value))
	}
}

// SetInt sets an attribute that is a number.
func (s Span) SetInt(name string, value int) {
	if s.On() {
		s.span.SetAttributes(attribute.Int(name, value))
	}
}

// Fail marks the span as failed, with a code from a fixed set. The text of an error only
// goes to the log, because it may have parts of commands and paths.
func (s Span) Fail(code string) {
	if s.On() {
		s.span.SetStatus(codes.Error, code)
		s.span.SetAttributes(attribute.String("error.type", code))
	}
}

// Failed calls Fail with a code for err: canceled, deadline_exceeded or error. It does
// nothing if err is nil.
func (s Span) Failed(err error) {
	if s.On() && err != nil {
		code := "error"
		switch {
		case errors.Is(err, context.Canceled):
			code = "canceled"
		case errors.Is(err, context.DeadlineExceeded):
			code = "deadline_exceeded"
		}
		s.Fail(code)
	}
}

// End ends the span.
func (s Span) End() {
	if s.On() {
		s.span.End()
	}
}

// EndWith calls Failed and End.
func (s Span) EndWith(err error) {
	s.Failed(err)
	s.End()
}

// closeWithin bounds Close for [Tracer.Stop].
const closeWithin = 2 * time.Second

// Stop calls Close with a timeout of two seconds, and logs an error.
func (t *Tracer) Stop(log *slog.Logger) {
	ctx, cancel := context.WithTimeout(context.Background(), closeWithin)
	defer cancel()
	if err := t.Close(ctx); err != nil {
		log.Warn("send the last traces", "error", err)
	}
}
