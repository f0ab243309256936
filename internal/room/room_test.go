package room

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
)

// TestWritersTogether: of many writers that begin at once, only as many are admitted
// as there is room for, and what one gives back another can have.
func TestWritersTogether(t *testing.T) {
	r := New(1000, func() (int64, error) { return 1500, nil })
	var begun, refused atomic.Int32
	all := make(chan struct{})
	failed := errors.New("failed")
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			err := r.During(100, func() error {
				begun.Add(1)
				<-all // every one has been admitted or refused
				return failed
			})
			var full *FullError
			if errors.As(err, &full) {
				if refused.Add(1) == 95 {
					close(all)
				}
			} else if !errors.Is(err, failed) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if begun.Load() != 5 || refused.Load() != 95 {
		t.Errorf("%d began, %d were refused; want 5 and 95", begun.Load(), refused.Load())
	}
	release, err := r.Hold(500)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Hold(1); err == nil {
		t.Error("there is room beyond what is held")
	}
	release()
	release() // once more is nothing
	// A pause may use the reserve, and others see that.
	release = r.Take(700)
	if _, err := r.Hold(0); err == nil {
		t.Error("a write begins below the reserve")
	}
	if left, err := r.Left(); left != 0 || err != nil {
		t.Errorf("%d are left, %v", left, err)
	}
	release()
	if left, err := r.Left(); left != 500 || err != nil {
		t.Errorf("%d are left, %v", left, err)
	}
	// A write that panics gives back what it held.
	func() {
		defer func() { _ = recover() }()
		_ = r.During(500, func() error { panic("x") })
	}()
	if left, _ := r.Left(); left != 500 {
		t.Errorf("%d are left after a panic", left)
	}
}
