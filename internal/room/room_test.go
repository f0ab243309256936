package room

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
)

// TestWritersTogether checks that of many concurrent writers as many are admitted as
// there is room for, and that released room can be used again.
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
				<-all // every writer has been admitted or refused
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
		t.Errorf("%d started, %d were refused; want 5 and 95", begun.Load(), refused.Load())
	}
	release, err := r.Reserve(500)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Reserve(1); err == nil {
		t.Error("there is room beyond the reservations")
	}
	release()
	release() // a second call does nothing
	// A pause may use the reserve, which reduces the others' room.
	release = r.Take(700)
	if _, err := r.Reserve(0); err == nil {
		t.Error("a write starts below the reserve")
	}
	if left, err := r.Left(); left != 0 || err != nil {
		t.Errorf("%d are left, %v", left, err)
	}
	release()
	if left, err := r.Left(); left != 500 || err != nil {
		t.Errorf("%d are left, %v", left, err)
	}
	// A write that panics releases its room.
	func() {
		defer func() { _ = recover() }()
		_ = r.During(500, func() error { panic("x") })
	}()
	if left, _ := r.Left(); left != 500 {
		t.Errorf("%d are left after a panic", left)
	}
}
