package logging

import (
	"sync"
	"time"
)

// maxKeys bounds the keys that a [Limit] counts. Further ones share the key "".
const maxKeys = 1024

// Limit bounds the records that a log gets for one key, such as a sandbox, because clients
// and guests can cause any number of them. It is safe for concurrent use.
type Limit struct {
	most   int
	per    time.Duration
	report func(key string, omitted int)

	mu   sync.Mutex
	seen map[string]int // records since the first one of this period
}

// NewLimit returns a limit of most records for each key in a period, which begins with the
// key's first record. If there were more, the limit calls report when the period ends, in
// a goroutine of its own.
func NewLimit(most int, per time.Duration, report func(key string, omitted int)) *Limit {
	return &Limit{most: most, per: per, report: report, seen: make(map[string]int)}
}

// Allow counts a record, and returns whether to log it.
func (l *Limit) Allow(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.seen[key]; !ok && len(l.seen) >= maxKeys {
		key = ""
	}
	if l.seen[key]++; l.seen[key] == 1 {
		time.AfterFunc(l.per, func() { l.end(key) })
	}
	return l.seen[key] <= l.most
}

// end ends the period of a key.
func (l *Limit) end(key string) {
	l.mu.Lock()
	omitted := l.seen[key] - l.most
	delete(l.seen, key)
	l.mu.Unlock()
	if omitted > 0 {
		l.report(key, omitted)
	}
}
