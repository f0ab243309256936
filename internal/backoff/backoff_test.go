package backoff

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestSeries(t *testing.T) {
	b := New(time.Second, 10*time.Second)
	for range 2 {
		for i, want := range []time.Duration{1, 2, 4, 8, 10, 10} {
			want *= time.Second
			if got := b.Next(); got < want*66/100 || got > want*134/100 {
				t.Errorf("wait %d is %v, not about %v", i, got, want)
			}
		}
		for range 100 { // no overflow
			if got := b.Next(); got < 6*time.Second || got > 14*time.Second {
				t.Errorf("wait %v", got)
			}
		}
		b.Reset()
	}
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(time.Minute, time.Hour)
		begin := time.Now()
		if err := b.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took < 40*time.Second || took > 81*time.Second {
			t.Errorf("waited for %v", took)
		}
		cause := errors.New("cause")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(cause)
		begin = time.Now()
		if err := b.Wait(ctx); !errors.Is(err, cause) || time.Since(begin) != 0 {
			t.Errorf("waited for %v: %v", time.Since(begin), err)
		}
	})
}
