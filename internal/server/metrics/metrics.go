// Package metrics stores the resource use of sandboxes over the last day, at three
// resolutions.
//
// It stores samples in Redis, which all servers share, in lists that are bounded and
// expire. Writing every few seconds for every sandbox would overload the database, and
// losing metrics harms nothing. A sample has the counters as the host reported them;
// [History.Read] computes rates from neighbouring samples. So any server can take the
// next sample without knowing the one before.
package metrics

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
)

// Window is one resolution: points every Step over the last Span.
type Window struct {
	Name string
	Span time.Duration
	Step time.Duration
}

// Windows lists the resolutions, finest first.
var Windows = []Window{
	{"10m", 10 * time.Minute, 5 * time.Second},
	{"2h", 2 * time.Hour, 30 * time.Second},
	{"24h", 24 * time.Hour, 5 * time.Minute},
}

// points is the maximum number of samples in a window: one more than it has steps, to
// compute the first point's rate.
func (w Window) points() int64 { return int64(w.Span/w.Step) + 1 }

// sampleWithin bounds the call to a host.
const sampleWithin = 4 * time.Second

// Sample is one reading of a sandbox's counters by its host.
type Sample struct {
	Time time.Time
	// CPU is the CPU time of the VM since it started.
	CPU time.Duration
	// VCPUs is the number of virtual CPUs.
	VCPUs       int
	MemoryBytes int64
	DiskBytes   int64
}

// size is the length of an encoded sample: five big-endian numbers of 8 bytes: time in ms
// since 1970, CPU in µs, number of virtual CPUs, memory and disk in bytes.
const size = 5 * 8

func (s Sample) encode() []byte {
	b := binary.BigEndian.AppendUint64(nil, uint64(s.Time.UnixMilli()))
	b = binary.BigEndian.AppendUint64(b, uint64(s.CPU.Microseconds()))
	b = binary.BigEndian.AppendUint64(b, uint64(s.VCPUs))
	b = binary.BigEndian.AppendUint64(b, uint64(s.MemoryBytes))
	return binary.BigEndian.AppendUint64(b, uint64(s.DiskBytes))
}

func decode(b string) (Sample, bool) {
	if len(b) != size {
		return Sample{}, false
	}
	n := func(i int) int64 { return int64(binary.BigEndian.Uint64([]byte(b[8*i : 8*i+8]))) }
	return Sample{time.UnixMilli(n(0)).UTC(), time.Duration(n(1)) * time.Microsecond, int(n(2)), n(3), n(4)}, true
}

// Point is a sandbox's resource use at a time.
type Point struct {
	Time time.Time
	// CPUPercent is the use of all virtual CPUs together since the previous point, 0 to
	// 100; nil: there is no previous point, or the sandbox was paused in between.
	CPUPercent  *float64
	MemoryBytes int64
	DiskBytes   int64
}

// History stores the metrics of all sandboxes.
type History struct {
	redis *redis.Client
	has   func(ctx context.Context, host *uuid.UUID) ([]uuid.UUID, error)
	log   *slog.Logger
}

// New returns the history in Redis. has lists a host's sandboxes; reports about other
// sandboxes are dropped.
func New(client *redis.Client, has func(ctx context.Context, host *uuid.UUID) ([]uuid.UUID, error), log *slog.Logger) *History {
	return &History{client, has, log}
}

func key(sandbox uuid.UUID, w Window) string {
	return "wrenn:metrics:" + sandbox.String() + ":" + w.Name
}

// add appends a sample to a window unless there is one of the same step, because two
// servers may sample the same host. The list expires when all samples are older than the
// window.
var add = redis.NewScript(`
local last = redis.call('LINDEX', KEYS[1], -1)
local function time(b)
	local t = 0
	for i = 1, 8 do t = t * 256 + string.byte(b, i) end
	return t
end
local step = tonumber(ARGV[2])
if last and math.floor(time(last) / step) >= math.floor(time(ARGV[1]) / step) then return 0 end
redis.call('RPUSH', KEYS[1], ARGV[1])
redis.call('LTRIM', KEYS[1], -tonumber(ARGV[3]), -1)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1`)

// Record stores samples of sandboxes.
func (h *History) Record(ctx context.Context, samples map[uuid.UUID]Sample) error {
	if len(samples) == 0 {
		return nil
	}
	if err := add.Load(ctx, h.redis).Err(); err != nil {
		return fmt.Errorf("record metrics: %w", err)
	}
	_, err := h.redis.Pipelined(ctx, func(p redis.Pipeliner) error {
		for sandbox, s := range samples {
			b := s.encode()
			for _, w := range Windows {
				add.EvalSha(ctx, p, []string{key(sandbox, w)}, b, w.Step.Milliseconds(), w.points(), (w.Span + w.Step).Milliseconds())
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("record metrics: %w", err)
	}
	return nil
}

// Read returns a sandbox's points in a window, oldest first.
func (h *History) Read(ctx context.Context, sandbox uuid.UUID, w Window) ([]Point, error) {
	kept, err := h.redis.LRange(ctx, key(sandbox, w), 0, -1).Result()
	if err != nil {
		return nil, fault.Because(err, fault.Unavailable, "metrics are unavailable")
	}
	var points []Point
	var before Sample
	since := time.Now().Add(-w.Span)
	for _, b := range kept {
		s, ok := decode(b)
		if !ok {
			continue
		}
		if !s.Time.Before(since) {
			points = append(points, point(before, s, w))
		}
		before = s
	}
	return points, nil
}

// point computes the point of a sample and the previous one (zero: none).
func point(before, s Sample, w Window) Point {
	p := Point{Time: s.Time, MemoryBytes: s.MemoryBytes, DiskBytes: s.DiskBytes}
	span, used := s.Time.Sub(before.Time), s.CPU-before.CPU
	// A smaller counter means that the VM restarted. If samples are missing, it may have
	// restarted in between.
	if before.Time.IsZero() || span <= 0 || span > 3*w.Step || used < 0 || s.VCPUs < 1 {
		return p
	}
	percent := min(100, 100*used.Seconds()/span.Seconds()/float64(s.VCPUs))
	p.CPUPercent = &percent
	return p
}

// Forget deletes a sandbox's metrics.
func (h *History) Forget(ctx context.Context, sandbox uuid.UUID) error {
	keys := make([]string, len(Windows))
	for i, w := range Windows {
		keys[i] = key(sandbox, w)
	}
	if err := h.redis.Unlink(ctx, keys...).Err(); err != nil {
		return fmt.Errorf("delete metrics: %w", err)
	}
	return nil
}

// Collect samples all sandboxes of a host at every step of the finest window until ctx is
// done.
func (h *History) Collect(ctx context.Context, host *hosts.Host) {
	tick := time.NewTicker(Windows[0].Step)
	defer tick.Stop()
	failing := false
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		err := h.sample(ctx, host)
		if err != nil && !failing && ctx.Err() == nil {
			h.log.Warn("sample sandboxes", "host", host.URL, "error", err)
		}
		failing = err != nil
	}
}

func (h *History) sample(ctx context.Context, host *hosts.Host) error {
	ctx, cancel := context.WithTimeout(ctx, sampleWithin)
	defer cancel()
	answer, err := host.Agent.Samples(ctx, connect.NewRequest(&hostagentv1.SamplesRequest{}))
	if connect.CodeOf(err) == connect.CodeUnimplemented {
		return errors.New("the host's agent is too old to report samples")
	}
	if err != nil {
		return err
	}
	// Use the server's clock, because the host's may be wrong.
	now := time.Now()
	has, err := h.has(ctx, &host.ID)
	if err != nil {
		return fmt.Errorf("list the host's sandboxes: %w", err)
	}
	reported := make(map[string]*hostagentv1.SamplesResponse_Sample, len(answer.Msg.Samples))
	for _, s := range answer.Msg.Samples {
		reported[s.SandboxId] = s
	}
	samples := make(map[uuid.UUID]Sample, len(has))
	for _, sandbox := range has {
		if s := reported[id.Format(id.Sandbox, sandbox)]; s != nil {
			samples[sandbox] = Sample{now, time.Duration(s.CpuUs) * time.Microsecond, int(s.Vcpus), s.MemoryBytes, s.DiskBytes}
		}
	}
	return h.Record(ctx, samples)
}
