package sandbox

import (
	"context"
	"sync"
	"time"
)

// turns limits how many operations run at a time, in total and for each key. Operations
// with the same key start one after the other: each when the one before has ended, or gap
// after that one started.
type turns struct {
	all    chan struct{}
	perKey int
	gap    time.Duration

	mu   sync.Mutex
	keys map[string]*turn
}

// turn has the places of one key. It exists while an operation uses or awaits one.
type turn struct {
	places chan struct{}
	begins chan struct{} // full until the next operation may start
	users  int
}

func newTurns(all, perKey int, gap time.Duration) *turns {
	return &turns{all: make(chan struct{}, all), perKey: perKey, gap: gap, keys: map[string]*turn{}}
}

// enter waits until an operation with the key may start. The caller calls leave once, at
// its end.
func (t *turns) enter(ctx context.Context, key string) (leave func(), err error) {
	k, forget := t.of(key)
	var taken []chan struct{}
	giveBack := func() {
		for _, c := range taken {
			<-c
		}
		forget()
	}
	for _, c := range []chan struct{}{k.places, t.all, k.begins} {
		select {
		case c <- struct{}{}:
			taken = append(taken, c)
		case <-ctx.Done():
			giveBack()
			return nil, context.Cause(ctx)
		}
	}
	taken = taken[:2] // The timer or leave releases begins.
	next := time.AfterFunc(t.gap, func() { <-k.begins })
	return func() {
		if next.Stop() {
			<-k.begins
		}
		giveBack()
	}, nil
}

func (t *turns) of(key string) (k *turn, forget func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if k = t.keys[key]; k == nil {
		k = &turn{places: make(chan struct{}, t.perKey), begins: make(chan struct{}, 1)}
		t.keys[key] = k
	}
	k.users++
	return k, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if k.users--; k.users == 0 {
			delete(t.keys, key)
		}
	}
}
