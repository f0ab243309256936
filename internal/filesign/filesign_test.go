package filesign

import (
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"
)

func FuzzSignature(f *testing.F) {
	f.Add("/a", "read", "user", "")
	f.Add("/a:read:user", "write", "", "17")
	f.Add("", "", ":", "-1")
	now := time.Unix(1_000_000, 0)
	f.Fuzz(func(t *testing.T, path, sig, user, expiration string) {
		q := url.Values{"path": {path}, "username": {user}, "signature": {sig}}
		if expiration != "" {
			q.Set("signature_expiration", expiration)
		}
		if Check("GET", q, "token", now) == nil && sig != Of(path, "read", user, "token", expiration) {
			t.Fatalf("%q passes", q)
		}
		q.Set("signature", Of(path, "read", user, "token", expiration))
		at, err := strconv.ParseInt(expiration, 10, 64)
		good := !strings.Contains(user, ":") && (expiration == "" || err == nil && strconv.FormatInt(at, 10) == expiration && at >= now.Unix())
		if (Check("GET", q, "token", now) == nil) != good {
			t.Fatalf("%q: passes is not %v", q, good)
		}
		if Check("POST", q, "token", now) == nil {
			t.Fatalf("%q: a signature for reading permits writing", q)
		}
	})
}
