package auth

import (
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
	for _, s := range []string{a.Access(x), a.Access(y), a.Traffic(x), a.Traffic(y), b.Access(x), b.Traffic(x)} {
		if len(s) != 64 || seen[s] {
			t.Errorf("token %q", s)
		}
		seen[s] = true
	}
	if !Equal(a.Access(x), a.Access(x)) || Equal("", a.Access(x)) || Equal(a.Access(y), a.Access(x)) {
		t.Error("tokens do not compare as they must")
	}
}
