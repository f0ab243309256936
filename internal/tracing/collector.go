package tracing

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
)

// collector is an OTLP client that logs the first failure, and the recovery.
type collector struct {
	otlptrace.Client
	log     *slog.Logger
	failing atomic.Bool
}

const (
	// sendWithin bounds one attempt to send.
	sendWithin = 10 * time.Second
	// maxAnswer bounds the collector's response, in bytes, because a refusal is logged.
	maxAnswer = 4 << 10
)

func newCollector(endpoint string, headers map[string]string, log *slog.Logger) (*collector, error) {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, errors.New("OTEL_EXPORTER_OTLP_ENDPOINT: want http://host:port or https://host:port") // without the URL, which may have a password
	}
	if u.User != nil {
		return nil, errors.New("OTEL_EXPORTER_OTLP_ENDPOINT: credentials belong in OTEL_EXPORTER_OTLP_HEADERS")
	}
	return &collector{log: log, Client: otlptracehttp.NewClient(
		otlptracehttp.WithEndpointURL(strings.TrimSuffix(endpoint, "/")+"/v1/traces"),
		otlptracehttp.WithHeaders(headers),
		otlptracehttp.WithHTTPClient(&http.Client{Timeout: sendWithin, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}),
		otlptracehttp.WithRetry(otlptracehttp.RetryConfig{Enabled: true, InitialInterval: time.Second, MaxInterval: 4 * time.Second, MaxElapsedTime: sendWithin}),
		otlptracehttp.WithMaxResponseSize(maxAnswer),
	)}, nil
}

// UploadTraces implements [otlptrace.Client].
func (c *collector) UploadTraces(ctx context.Context, spans []*tracepb.ResourceSpans) error {
	err := c.Client.UploadTraces(ctx, spans)
	switch was := c.failing.Swap(err != nil); {
	case err != nil && !was:
		c.log.Warn("traces are lost: the collector does not accept them", "error", err)
	case err == nil && was:
		c.log.Info("the collector accepts traces again")
	}
	return err
}
