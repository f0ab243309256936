package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestPassed has a client whose connection was passed say nothing that only a
// front door may, and reach nothing but ports.
func TestPassed(t *testing.T) {
	h := passed(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header, r.RemoteAddr)
	}), func(r *http.Request) bool { return r.Host == "80-cl-x.localhost" })
	for host, want := range map[string]int{"80-cl-x.localhost": 200, "localhost": 421} {
		r := httptest.NewRequest(http.MethodGet, "http://"+host+"/v1/x", nil)
		for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
			r.Header.Set(name, "me")
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != want || strings.Contains(w.Body.String(), "me") && want == 200 {
			t.Errorf("%s: %d %s", host, w.Code, w.Body)
		}
		if want == 421 && (w.Header().Get("Connection") != "close" || !strings.HasPrefix(w.Body.String(), `{"error":{"code":`)) {
			t.Errorf("%s: %v %s", host, w.Header(), w.Body)
		}
	}
}
