package e2e

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/await"
)

// collector receives the traces of an installation.
type collector struct {
	*httptest.Server
	mu    sync.Mutex
	spans []recorded
	raw   bytes.Buffer
	more  chan struct{} // closed and replaced when there are more spans
}

// recorded is a span and the name of the program that recorded it.
type recorded struct {
	*tracepb.Span
	program string
}

func newCollector(t *testing.T) *collector {
	c := &collector{more: make(chan struct{})}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var export collectorpb.ExportTraceServiceRequest
		if err == nil {
			err = proto.Unmarshal(body, &export)
		}
		if err != nil || r.Method != http.MethodPost || r.URL.Path != "/v1/traces" || r.Header.Get("X-Token") != "of the collector" {
			t.Errorf("the collector got %s %s %v: %v", r.Method, r.URL, r.Header, err)
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.raw.Write(body)
		for _, resource := range export.GetResourceSpans() {
			program := attribute(resource.GetResource().GetAttributes(), "service.name")
			for _, scope := range resource.GetScopeSpans() {
				for _, span := range scope.GetSpans() {
					c.spans = append(c.spans, recorded{span, program})
				}
			}
		}
		close(c.more)
		c.more = make(chan struct{})
	}))
	t.Cleanup(c.Close)
	return c
}

// lineage returns the names of the spans above a span, from the front door down, if the
// collector has all of them and the first is the request's.
func (c *collector) lineage(of recorded, request string) (names []string, ok bool) {
	byID := map[string]recorded{}
	for _, s := range c.spans {
		if bytes.Equal(s.GetTraceId(), of.GetTraceId()) {
			byID[string(s.GetSpanId())] = s
		}
	}
	for s := of; ; {
		names = append(names, s.program+" "+s.GetName())
		if len(s.GetParentSpanId()) == 0 {
			slices.Reverse(names)
			return names, attribute(s.GetAttributes(), "wrenn.request_id") == request
		}
		if s, ok = byID[string(s.GetParentSpanId())]; !ok {
			return nil, false
		}
	}
}

// wants waits until the request's trace has a span with the given names above it, the
// root's first.
func (c *collector) wants(t *testing.T, request string, want ...string) {
	t.Helper()
	found := map[string]bool{}
	for hang := time.After(await.Hang); ; {
		c.mu.Lock()
		for _, s := range c.spans {
			if names, ok := c.lineage(s, request); ok {
				found[strings.Join(names, " > ")] = true
			}
		}
		more := c.more
		c.mu.Unlock()
		if found[strings.Join(want, " > ")] {
			return
		}
		select {
		case <-more:
			continue
		case <-hang:
		}
		break
	}
	t.Errorf("%s: no span is\n  %s\nof\n  %s", request, strings.Join(want, " > "), strings.Join(slices.Sorted(maps.Keys(found)), "\n  "))
}

// attribute returns the text of an attribute, or "".
func attribute(all []*commonpb.KeyValue, key string) string {
	for _, a := range all {
		if a.GetKey() == key {
			return a.GetValue().GetStringValue()
		}
	}
	return ""
}

// named is a transport that gives each request an id.
type named struct {
	next http.RoundTripper
	id   string
}

func (n *named) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("X-Request-Id", n.id)
	return n.next.RoundTrip(r)
}

// TestTraces follows a creation, a pause, a resume, a command, a request to a port and a
// build from the front door to the guest, at a collector that the test starts. No secret
// reaches the collector. The installation also serves [checkRequestIDs].
func TestTraces(t *testing.T) {
	if why := unable(); why != "" {
		t.Skip(why)
	}
	c := newCollector(t)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", c.URL)
	t.Setenv("WRENN_LOG_LEVEL", "debug") // for the request ids
	t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "X-Token=of%20the%20collector")
	dir, err := newDir()
	if err != nil {
		t.Fatal(err)
	}
	defer discard(t, dir)
	listen, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	i, err := start(dir, listen)
	if err != nil {
		t.Fatal(err)
	}
	// as returns a client whose requests have an id, marked as external.
	as := func(id string) (*client.Client, string) {
		cl, err := client.New("http://"+listen, i.creds.APIKey, client.WithHTTPClient(&http.Client{Transport: &named{checked(t), id}}))
		if err != nil {
			t.Fatal(err)
		}
		return cl, "ext-" + id
	}
	const secret = "hunter2"
	const server, agent = "wrenn-server ", "wrenn-agent "

	cl, id := as("create")
	box, err := cl.Create(t.Context(), client.CreateOptions{Envs: map[string]string{"PASSWORD": secret}, Metadata: map[string]string{"about": secret}})
	if err != nil {
		t.Fatal(err)
	}
	c.wants(t, id, server+"POST /v1/sandboxes", server+"create: host", server+"call host: Create",
		agent+"Create", agent+"create", agent+"create: init", agent+"guest /init", agent+"in the guest")
	c.wants(t, id, server+"POST /v1/sandboxes", server+"create: write")

	cl, id = as("exec")
	result, err := cl.Exec(t.Context(), box.ID, client.Command{Cmd: "echo " + secret + "; cat", Shell: true}, []byte(secret))
	if err != nil || result.ExitCode != 0 {
		t.Fatalf("%+v, %v", result, err)
	}
	c.wants(t, id, server+"POST /v1/sandboxes/{sandbox_id}/exec", agent+"ExecStream", agent+"guest /process.Process/Start", agent+"in the guest")

	t.Run("request ids", func(t *testing.T) { checkRequestIDs(t, i, box) })

	cl, id = as("pause")
	if _, err := cl.Pause(t.Context(), box.ID); err != nil {
		t.Fatal(err)
	}
	c.wants(t, id, server+"POST /v1/sandboxes/{sandbox_id}/pause", server+"pause: host", server+"call host: Pause",
		agent+"Pause", agent+"pause", agent+"pause: hold", agent+"guest /freeze", agent+"in the guest")

	cl, id = as("resume")
	if _, err := cl.Resume(t.Context(), box.ID); err != nil {
		t.Fatal(err)
	}
	c.wants(t, id, server+"POST /v1/sandboxes/{sandbox_id}/resume", server+"resume: host", server+"call host: Resume",
		agent+"Resume", agent+"resume", agent+"resume: init", agent+"guest /init", agent+"in the guest")

	// The client's own trace must reach its program in the sandbox, and ours must not
	// continue it.
	resp := i.request(t, http.MethodGet, fmt.Sprintf("49983-%s.localhost", box.ID), "/envs?secret="+secret, http.Header{
		"X-Api-Key": {i.creds.APIKey}, "X-Access-Token": {box.AccessToken}, "X-Request-Id": {"port"}, "Traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
	}, nil)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("status %d", resp.StatusCode)
	}
	c.wants(t, "ext-port", server+"proxy", agent+"proxy", agent+"guest port")

	cl, id = as("build")
	build, err := cl.Build(t.Context(), client.BuildOptions{Name: "traced", Recipe: "FROM minimal\nRUN echo " + secret, SkipPrePost: true})
	if err != nil {
		t.Fatal(err)
	}
	c.wants(t, id, server+"POST /v1/templates/builds", server+"build", server+"build: recipe", agent+"ExecStream", agent+"guest /process.Process/Start", agent+"in the guest")
	if build, err = cl.FollowBuild(t.Context(), build.ID, func(client.BuildEvent) {}); err != nil || build.State != "succeeded" {
		t.Fatalf("%+v, %v", build, err)
	}

	if err := cl.Delete(t.Context(), box.ID); err != nil {
		t.Error(err)
	}
	if err := i.stop(); err != nil {
		t.Error(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for what, word := range map[string]string{"a secret": secret, "the API key": i.creds.APIKey, "a sandbox's token": box.AccessToken} {
		if bytes.Contains(c.raw.Bytes(), []byte(word)) {
			t.Errorf("%s is in a trace", what)
		}
	}
}
