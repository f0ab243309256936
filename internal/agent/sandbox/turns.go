package sandbox

import (
	"context"
	"sync"
	"time"
)

// turns bounds how much is done at a time, in all and for each key. With the same key one
// begins when the one before has left, or after gap. Whoever comes first has the first turn.
type turns struct {
	all    chan struct{}
	perKey int
	gap    time.Duration

	mu   sync.Mutex
	keys map[string]*turn
}

// turn has the places of one key. It exists while somebody uses or wants one.
type turn struct {
	places chan struct{}
	begins chan struct{} // has room for the one that begins
	users  int
}

func newTurns(all, perKey int, gap time.Duration) *turns {
	return &turns{all: make(chan struct{}, all), perKey: perKey, gap: gap, keys: map[string]*turn{}}
}

// enter waits for a turn. The caller calls leave once.
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
	taken = taken[:2] // The timer has the third.
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
