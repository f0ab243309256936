package client

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"strconv"
	"testing"
	"time"
)

func TestVerifyWebhook(t *testing.T) {
	const secret, body = "0123456789abcdef", `{"event":"test"}`
	sign := func(secret, body string, at time.Time) string {
		stamp := strconv.FormatInt(at.Unix(), 10)
		m := hmac.New(sha256.New, []byte(secret))
		m.Write([]byte(stamp + "." + body))
		return "t=" + stamp + ",v1=" + hex.EncodeToString(m.Sum(nil))
	}
	now := time.Now()
	for name, c := range map[string]struct {
		signature string
		ok        bool
	}{
		"signed":         {sign(secret, body, now), true},
		"other secret":   {sign("another secret....", body, now), false},
		"other body":     {sign(secret, "{}", now), false},
		"old":            {sign(secret, body, now.Add(-time.Hour)), false},
		"of the future":  {sign(secret, body, now.Add(time.Hour)), false},
		"none":           {"", false},
		"no version":     {"t=1", false},
		"no hexadecimal": {"t=1,v1=zz", false},
	} {
		err := VerifyWebhook(http.Header{"Wrenn-Signature": {c.signature}}, []byte(body), secret, 0)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
