package auth

import (
	"math"
	"strings"
	"testing"

	"github.com/google/uuid"
)

func TestPassword(t *testing.T) {
	hash := Cost{}.Hash("correct horse")
	if strings.Contains(hash, "correct") || hash == (Cost{}).Hash("correct horse") {
		t.Errorf("hash %q tells", hash)
	}
	for password, want := range map[string]bool{"correct horse": true, "correct horse ": false, "": false} {
		if got, err := CheckPassword(hash, password); got != want || err != nil {
			t.Errorf("CheckPassword(%q) = %v, %v", password, got, err)
		}
	}
	parts := strings.Split(hash, "$")
	for _, bad := range []string{"", "plain", "$argon2i$v=19$m=65536,t=3,p=4$AAAA$AAAA", strings.Replace(hash, "v=19", "v=18", 1), strings.Replace(hash, "t=3", "t=0", 1), strings.Replace(hash, "p=4", "p=0", 1), strings.Join(parts[:5], "$") + "$", strings.Replace(hash, parts[4], "!", 1)} {
		if ok, err := CheckPassword(bad, "correct horse"); ok || err == nil {
			t.Errorf("CheckPassword with hash %q = %v, %v; want an error", bad, ok, err)
		}
	}
}

func TestTokens(t *testing.T) {
	a, b := NewTokens([]byte("one secret")), NewTokens([]byte("another"))
	x, y := uuid.New(), uuid.New()
	seen := make(map[string]bool)
	for _, s := range []string{a.Access(x, 0), a.Access(y, 0), a.Traffic(x, 0), a.Traffic(y, 0), b.Access(x, 0), b.Traffic(x, 0), a.Access(x, 1), a.Traffic(x, 1), a.Access(x, 12), b.Access(x, 1)} {
		if len(s) < 64 || seen[s] {
			t.Errorf("token %q", s)
		}
		seen[s] = true
	}
	if !Equal(a.Access(x, 0), a.Guest(x)) || Equal("", a.Guest(x)) || Equal(a.Guest(y), a.Guest(x)) {
		t.Error("Equal compares tokens wrongly")
	}
	for _, epoch := range []int32{0, 1, 12, math.MaxInt32} {
		if got, ok := a.AccessEpoch(x, a.Access(x, epoch)); !ok || got != epoch {
			t.Errorf("an access token of epoch %d is of %d, %v", epoch, got, ok)
		}
		if got, ok := a.TrafficEpoch(x, a.Traffic(x, epoch)); !ok || got != epoch {
			t.Errorf("a traffic token of epoch %d is of %d, %v", epoch, got, ok)
		}
	}
	_, mac, _ := strings.Cut(a.Access(x, 1), ".")
	for _, bad := range []string{"", ".", mac, "2." + mac, "0." + mac, "01." + mac, "+1." + mac, "-1." + mac, "99999999999." + mac, "1." + mac + "0", "0." + a.Access(x, 0), a.Traffic(x, 1), a.Access(y, 1), b.Access(x, 1)} {
		if _, ok := a.AccessEpoch(x, bad); ok {
			t.Errorf("%q is accepted", bad)
		}
	}
}
