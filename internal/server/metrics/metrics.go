// Package metrics keeps what sandboxes used of their hosts over the last day,
// at three resolutions.
//
// It is kept in Redis, where all servers find it: lists of a bounded length
// that end by themselves, written to every few seconds for every sandbox, which
// would be a burden to the database, and with which nothing is lost that
// anything rests on. Points hold counters as hosts gave them. What is shown is
// computed from neighbours when it is asked for, so whichever server takes the
// next sample needs to know nothing of the one before.
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

// Window is how far back points reach, and how far they are apart.
type Window struct {
	Name string
	Span time.Duration
	Step time.Duration
}

// Windows are the resolutions, the finest first.
var Windows = []Window{
	{"10m", 10 * time.Minute, 5 * time.Second},
	{"2h", 2 * time.Hour, 30 * time.Second},
	{"24h", 24 * time.Hour, 5 * time.Minute},
}

// points is the most that a window has: one more than fit, to compute the first
// from.
func (w Window) points() int64 { return int64(w.Span/w.Step) + 1 }

// sampleWithin bounds the call of a host.
const sampleWithin = 4 * time.Second

// Sample is what a sandbox used at a time, as its host counted it.
type Sample struct {
	Time time.Time
	// CPU is how long its virtual machine has computed since it began.
	CPU time.Duration
	// VCPUs are how many it has.
	VCPUs       int
	MemoryBytes int64
	DiskBytes   int64
}

// size of a sample as it is kept: five numbers of 8 bytes, big-endian: time in
// ms since 1970, CPU in µs, processors, memory and disk in bytes.
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

// Point is what a sandbox used at a time.
type Point struct {
	Time time.Time
	// CPUPercent of all its processors together since the point before, 0 to 100;
	// nil: there is none, or the sandbox was paused in between.
	CPUPercent  *float64
	MemoryBytes int64
	DiskBytes   int64
}

// History is the metrics of all sandboxes.
type History struct {
	redis *redis.Client
	has   func(ctx context.Context, host *uuid.UUID) ([]uuid.UUID, error)
	log   *slog.Logger
}

// New returns the history in a Redis. has lists a host's sandboxes: what the host reports
// on others is dropped.
func New(client *redis.Client, has func(ctx context.Context, host *uuid.UUID) ([]uuid.UUID, error), log *slog.Logger) *History {
	return &History{client, has, log}
}

func key(sandbox uuid.UUID, w Window) string {
	return "wrenn:metrics:" + sandbox.String() + ":" + w.Name
}

// add is one sample of one window, unless there is one of the same step: of
// servers that both believe that a host is theirs one adds. Lists end when all
// they have is older than the window.
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

// Record adds samples of sandboxes.
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

// Read returns a sandbox's points in a window, the oldest first.
func (h *History) Read(ctx context.Context, sandbox uuid.UUID, w Window) ([]Point, error) {
	kept, err := h.redis.LRange(ctx, key(sandbox, w), 0, -1).Result()
	if err != nil {
		return nil, fault.Because(err, fault.Unavailable, "metrics cannot be read now")
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

// point is what is shown of a sample after another (zero: none).
func point(before, s Sample, w Window) Point {
	p := Point{Time: s.Time, MemoryBytes: s.MemoryBytes, DiskBytes: s.DiskBytes}
	span, used := s.Time.Sub(before.Time), s.CPU-before.CPU
	// What has computed for less than before is another machine, and where
	// samples are missing there may have been one.
	if before.Time.IsZero() || span <= 0 || span > 3*w.Step || used < 0 || s.VCPUs < 1 {
		return p
	}
	percent := min(100, 100*used.Seconds()/span.Seconds()/float64(s.VCPUs))
	p.CPUPercent = &percent
	return p
}

// Forget drops all of a sandbox's metrics.
func (h *History) Forget(ctx context.Context, sandbox uuid.UUID) error {
	keys := make([]string, len(Windows))
	for i, w := range Windows {
		keys[i] = key(sandbox, w)
	}
	if err := h.redis.Unlink(ctx, keys...).Err(); err != nil {
		return fmt.Errorf("forget metrics: %w", err)
	}
	return nil
}

// Watch asks a host at every step what its sandboxes use, in one call, and
// records it, until ctx is done.
func (h *History) Watch(ctx context.Context, host *hosts.Host) {
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
		return errors.New("the host's agent is older than the control plane and cannot")
	}
	if err != nil {
		return err
	}
	// The server's clock: a host's may be off.
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
