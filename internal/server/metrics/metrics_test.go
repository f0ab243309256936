package metrics

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/events/redistest"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
)

// reports is an agent that reports usage of any sandboxes.
type reports struct {
	hostagentv1connect.HostAgentClient
	of []string
}

func (r reports) Samples(context.Context, *connect.Request[hostagentv1.SamplesRequest]) (*connect.Response[hostagentv1.SamplesResponse], error) {
	m := &hostagentv1.SamplesResponse{}
	for _, sandbox := range r.of {
		m.Samples = append(m.Samples, &hostagentv1.SamplesResponse_Sample{SandboxId: sandbox, Vcpus: 1, MemoryBytes: 1 << 40})
	}
	return connect.NewResponse(m), nil
}

// TestSamplesOfOthers checks that the server keeps a host's samples of its own sandboxes
// only, and none of another host's or of made-up sandboxes.
func TestSamplesOfOthers(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "redis.sock")
	redistest.Start(t, socket)
	client := redis.NewClient(&redis.Options{Network: "unix", Addr: socket})
	defer client.Close()
	mine, other, madeUp := uuid.New(), uuid.New(), uuid.New()
	host := &hosts.Host{ID: uuid.New(), Agent: reports{of: []string{
		"malformed", id.Format(id.Sandbox, other), id.Format(id.Sandbox, mine), id.Format(id.Sandbox, madeUp),
	}}}
	h := New(client, func(_ context.Context, of *uuid.UUID) ([]uuid.UUID, error) {
		if *of != host.ID {
			t.Errorf("asked for the sandboxes of %v", *of)
		}
		return []uuid.UUID{mine, uuid.New()}, nil
	}, slog.New(slog.DiscardHandler))
	if err := h.sample(t.Context(), host); err != nil {
		t.Fatal(err)
	}
	keys, err := client.Keys(t.Context(), "*").Result()
	if err != nil || len(keys) != len(Windows) {
		t.Errorf("Redis has %v, %v", keys, err)
	}
	points, err := h.Read(t.Context(), mine, Windows[0])
	if err != nil || len(points) != 1 {
		t.Errorf("its own sandbox has the points %v, %v", points, err)
	}
}

// TestPoint checks what the server computes from two samples.
func TestPoint(t *testing.T) {
	w := Windows[0]
	at := time.Now()
	for name, c := range map[string]struct {
		before, s Sample
		want      float64 // -1 means none
	}{
		"half of two":      {Sample{at, time.Second, 2, 0, 0}, Sample{at.Add(5 * time.Second), 6 * time.Second, 2, 0, 0}, 50},
		"more than it has": {Sample{at, time.Second, 1, 0, 0}, Sample{at.Add(5 * time.Second), 60 * time.Second, 1, 0, 0}, 100},
		"the first":        {Sample{}, Sample{at, time.Second, 1, 0, 0}, -1},
		"after a resume":   {Sample{at, 9 * time.Second, 1, 0, 0}, Sample{at.Add(5 * time.Second), time.Second, 1, 0, 0}, -1},
		"after a pause":    {Sample{at, time.Second, 1, 0, 0}, Sample{at.Add(time.Minute), 2 * time.Second, 1, 0, 0}, -1},
	} {
		p := point(c.before, c.s, w)
		if (p.CPUPercent == nil) != (c.want < 0) || p.CPUPercent != nil && *p.CPUPercent != c.want {
			t.Errorf("%s: %v, want %v", name, p.CPUPercent, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(string(Sample{time.UnixMilli(1700000000000), time.Second, 2, 1 << 30, 1 << 20}.encode()))
	f.Add("")
	f.Fuzz(func(t *testing.T, b string) {
		s, ok := decode(b)
		if ok != (len(b) == size) {
			t.Fatal("a sample of another length")
		}
		point(s, s, Windows[0])
	})
}
