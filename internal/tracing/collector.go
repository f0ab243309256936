package tracing

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sethvargo/go-retry"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// collector sends spans by OTLP over HTTP. OpenTelemetry's own client does too, but links
// all of gRPC.
type collector struct {
	url     string
	headers map[string]string
	client  *http.Client
	log     *slog.Logger
	failing atomic.Bool
}

// sendWithin bounds one attempt to send.
const sendWithin = 10 * time.Second

func newCollector(endpoint string, headers map[string]string, log *slog.Logger) (*collector, error) {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, errors.New("OTEL_EXPORTER_OTLP_ENDPOINT: want http://host:port or https://host:port") // It may have a password.
	}
	return &collector{
		url: strings.TrimSuffix(endpoint, "/") + "/v1/traces", headers: headers, log: log,
		client: &http.Client{Timeout: sendWithin, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
	}, nil
}

// Start implements [otlptrace.Client].
func (c *collector) Start(context.Context) error { return nil }

// Stop implements [otlptrace.Client].
func (c *collector) Stop(context.Context) error {
	c.client.CloseIdleConnections()
	return nil
}

// UploadTraces implements [otlptrace.Client]. It logs the first failure, and that it
// works again.
func (c *collector) UploadTraces(ctx context.Context, spans []*tracepb.ResourceSpans) error {
	// The message of the export's RPC has the same single field.
	body, err := proto.Marshal(&tracepb.TracesData{ResourceSpans: spans})
	if err != nil {
		return fmt.Errorf("encode spans: %w", err)
	}
	err = retry.Do(ctx, retry.WithMaxRetries(3, retry.NewExponential(time.Second)), func(ctx context.Context) error { return c.send(ctx, body) })
	switch was := c.failing.Swap(err != nil); {
	case err != nil && !was:
		c.log.Warn("traces are lost: the collector does not take them", "error", err)
	case err == nil && was:
		c.log.Info("the collector takes traces again")
	}
	return err
}

func (c *collector) send(ctx context.Context, body []byte) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return errors.New("the collector's URL cannot be used")
	}
	for name, value := range c.headers {
		r.Header.Set(name, value)
	}
	r.Header.Set("Content-Type", "application/x-protobuf")
	resp, err := c.client.Do(r)
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // without the URL, which may have a password
	}
	if err != nil {
		return retry.RetryableError(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)); err != nil {
		return retry.RetryableError(err)
	}
	switch resp.StatusCode {
	case http.StatusOK, http.StatusAccepted, http.StatusNoContent:
		return nil
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return retry.RetryableError(fmt.Errorf("status %d", resp.StatusCode))
	}
	return fmt.Errorf("status %d", resp.StatusCode)
}
