package server_test

import (
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-redis/redis_rate/v10"
	"github.com/redis/go-redis/v9"
)

// What holds for every operation of the OpenAPI document is checked for every
// operation of it, so that a new one cannot be forgotten.

// anybody says whether an operation asks for no credentials.
func (o operation) anybody() bool { return o.Security != nil && len(*o.Security) == 0 }

// rates are how often one address may call what anybody may, in a minute, by
// the operation's tag.
var rates = map[string]int{"login": 30, "service": 600, "hosts": 12000}

// checkRates calls every operation that anybody may call, each from an address
// of its own, until it is refused.
func checkRates(t *testing.T, p *plane) {
	w := p.world()
	nobody := callers()[0]
	options, err := redis.ParseURL(p.config.RedisURL)
	if err != nil {
		t.Fatal(err)
	}
	client := redis.NewClient(options)
	defer client.Close()
	counts := func() map[string]bool {
		found := make(map[string]bool)
		for _, key := range client.Keys(t.Context(), "rate:*").Val() {
			found[key] = true
		}
		return found
	}
	checked := 0
	for _, o := range operations(t) {
		if !o.anybody() {
			continue
		}
		checked++
		most, ok := rates[o.Tags[0]]
		if !ok {
			t.Errorf("%s: nothing is known of how often it may be called", o)
			continue
		}
		// From here on calls are counted for this address, and for this operation
		// if it is one of the login's.
		from := 10000 + checked
		before, begun := counts(), time.Now()
		answered := 0
		r := w.send(o, nobody, targets[0], from)
		if most > 100 {
			// So many are asked for by a word with Redis.
			for key := range counts() {
				if !before[key] {
					spent, err := redis_rate.NewLimiter(client).AllowAtMost(t.Context(), strings.TrimPrefix(key, "rate:"), redis_rate.PerMinute(most), most)
					if err != nil {
						t.Fatal(err)
					}
					answered += spent.Allowed
				}
			}
		}
		for r.Status != http.StatusTooManyRequests && answered < 2*most {
			answered++
			r = w.send(o, nobody, targets[0], from)
		}
		// What is used up comes back bit by bit.
		if again := int(time.Since(begun).Seconds()*float64(most)/60) + 1; r.Status != http.StatusTooManyRequests || answered < most || answered > most+again {
			t.Errorf("%s: of %d calls the last was answered %d; want %d answered, then 429", o, answered+1, r.Status, most)
			continue
		}
		r.fails(429, "rate_limited")
		if wait, err := strconv.Atoi(r.Header.Get("Retry-After")); err != nil || wait < 1 || wait > 60 {
			t.Errorf("%s: Retry-After: %q", o, r.Header.Get("Retry-After"))
		}
		if r := w.send(o, nobody, targets[0], from+1000); r.Status == http.StatusTooManyRequests {
			t.Errorf("%s: another address is refused too", o)
		}
	}
	if checked < 15 {
		t.Errorf("only %d operations that anybody may call", checked)
	}
	t.Logf("rates of %d operations that anybody may call", checked)
}
