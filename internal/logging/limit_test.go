package logging

import (
	"fmt"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reports []string
		l := NewLimit(3, time.Minute, func(key string, omitted int) { reports = append(reports, fmt.Sprint(key, " ", omitted)) })
		logs := func(key string, records int) (n int) {
			for range records {
				if l.Allow(key) {
					n++
				}
			}
			return n
		}
		after := func(d time.Duration, want ...string) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			if !slices.Equal(reports, want) {
				t.Errorf("the reports are %q, not %q", reports, want)
			}
			reports = nil
		}
		if a, b := logs("a", 10), logs("b", 3); a != 3 || b != 3 {
			t.Errorf("%d and %d records are logged", a, b)
		}
		after(time.Minute-1, []string{}...)
		if n := logs("a", 1); n != 0 {
			t.Error("a record is logged at the end of the period")
		}
		after(1, "a 8")
		if n := logs("a", 4); n != 3 {
			t.Errorf("%d records are logged in the next period", n)
		}
		after(time.Minute, "a 1")
		// Keys without end take no memory without end.
		for i := range 10 * maxKeys {
			l.Allow(strconv.Itoa(i))
		}
		keys := func() int {
			l.mu.Lock()
			defer l.mu.Unlock()
			return len(l.seen)
		}
		if n := keys(); n > maxKeys+1 {
			t.Errorf("it counts %d keys", n)
		}
		after(time.Minute, fmt.Sprint(" ", 9*maxKeys-3))
		if n := keys(); n != 0 {
			t.Errorf("%d keys are left", n)
		}
	})
}
