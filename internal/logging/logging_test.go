package logging

import (
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/slogtest"
)

// TestSet checks that a change of level and format affects existing loggers.
func TestSet(t *testing.T) {
	var b strings.Builder
	l := New(&b, Settings{Level: slog.LevelWarn, Format: Text})
	part := l.With("part", "p").WithGroup("g")
	part.Info("one", "k", 1)
	if b.String() != "" {
		t.Errorf("below the level: %q", b.String())
	}
	part.Warn("two", "k", 2)
	if got := b.String(); !strings.Contains(got, "level=WARN msg=two part=p g.k=2\n") {
		t.Errorf("text: %q", got)
	}
	b.Reset()
	l.Set(Settings{Level: slog.LevelDebug, Format: JSON})
	part.Debug("three", "k", 3)
	var record struct {
		Level, Msg, Part string
		G                struct{ K int }
	}
	if err := json.Unmarshal([]byte(b.String()), &record); err != nil || record.Level != "DEBUG" || record.Msg != "three" || record.Part != "p" || record.G.K != 3 {
		t.Errorf("json: %q, %v", b.String(), err)
	}
}

func TestHandler(t *testing.T) {
	var b strings.Builder
	slogtest.Run(t, func(*testing.T) slog.Handler {
		b.Reset()
		return New(&b, Settings{Format: JSON}).Handler()
	}, func(t *testing.T) map[string]any {
		var m map[string]any
		if err := json.Unmarshal([]byte(b.String()), &m); err != nil {
			t.Fatal(err)
		}
		return m
	})
}

// TestLongValues checks that values that a client or guest chose do not fill the log.
func TestLongValues(t *testing.T) {
	for _, format := range []Format{Text, JSON} {
		var b strings.Builder
		l := New(&b, Settings{Format: format})
		long := strings.Repeat("x", 1<<20)
		l.With("a", long).Info("m", "error", errors.New(long), "b", long, slog.Group("g", "c", long))
		if n := b.Len(); n < 4*maxValue || n > 5*maxValue {
			t.Errorf("%s: four values of 1 MiB are logged as %d bytes", format, n)
		}
	}
}

func TestFormat(t *testing.T) {
	var f Format
	if err := f.UnmarshalText([]byte("json")); err != nil || f != JSON {
		t.Errorf("%q, %v", f, err)
	}
	if err := f.UnmarshalText([]byte("xml")); err == nil || f != JSON {
		t.Errorf("xml: %q, %v", f, err)
	}
}
