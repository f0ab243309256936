package each_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wrenn-dev/wrenn/internal/server/each"
)

var quiet = slog.New(slog.DiscardHandler)

// TestDo has functions that fail, panic, hang until all others are done, or run into the
// time limit.
func TestDo(t *testing.T) {
	broken := errors.New("broken")
	var done atomic.Int32
	others := make(chan struct{})
	err := each.Do(t.Context(), quiet, 3, 50*time.Millisecond, []string{"late", "hangs", "fails", "panics", "a", "b", "c"}, func(ctx context.Context, name string) error {
		switch name {
		case "fails":
			return broken
		case "panics":
			panic("oops")
		case "hangs":
			<-others
		case "late":
			<-ctx.Done()
			return ctx.Err()
		}
		if name != "hangs" && done.Add(1) == 3 {
			close(others)
		}
		return nil
	})
	if done.Load() != 3 {
		t.Errorf("%d were completed", done.Load())
	}
	if !errors.Is(err, broken) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "panic: oops") {
		t.Errorf("error %v", err)
	}
}

// TestDoBounded checks that no more functions run at once than allowed.
func TestDoBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now, most atomic.Int32
		err := each.Do(t.Context(), quiet, 2, time.Minute, make([]int, 20), func(context.Context, int) error {
			for n := now.Add(1); ; {
				if m := most.Load(); n <= m || most.CompareAndSwap(m, n) {
					break
				}
			}
			time.Sleep(time.Millisecond)
			now.Add(-1)
			return nil
		})
		if err != nil || most.Load() != 2 {
			t.Errorf("%d at once, %v", most.Load(), err)
		}
	})
}

// TestDoStops checks that Do starts nothing after its context has ended.
func TestDoStops(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	err := each.Do(ctx, quiet, 1, time.Minute, make([]int, 5), func(ctx context.Context, _ int) error {
		n++
		cancel()
		<-ctx.Done()
		return nil
	})
	if n > 2 || !errors.Is(err, context.Canceled) {
		t.Errorf("%d were started, %v", n, err)
	}
}
