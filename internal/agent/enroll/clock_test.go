package enroll

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/pki"
)

// wire carries requests to a plane without a network, so that the test can move the
// clock, and records them.
type wire struct {
	*plane
	saying sync.Mutex // renewals and heartbeats run concurrently
	said   []string
	keys   []string // of signing requests
}

func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	w.saying.Lock()
	defer w.saying.Unlock()
	w.said = append(w.said, string(body))
	var m struct{ CSR string }
	if err := json.Unmarshal(body, &m); err != nil {
		return nil, err
	}
	if block, _ := pem.Decode([]byte(m.CSR)); block != nil {
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			return nil, err
		}
		w.keys = append(w.keys, string(csr.RawSubjectPublicKeyInfo))
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	answer := httptest.NewRecorder()
	w.serve(answer, r)
	return answer.Result(), nil
}

// TestClock moves the clock. The running agent replaces its leaf every half hour, with a
// new key each time, and sends only the public part. After the agent was stopped for
// longer than a leaf is valid, the next agent gets a new leaf before it serves.
func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, err := pki.NewAuthority()
		if err != nil {
			t.Fatal(err)
		}
		w := &wire{plane: &plane{ca: ca, host: uuid.New(), news: make(chan struct{}), every: time.Minute}}
		go func() {
			for range w.news { // Nobody here waits for news.
			}
		}()
		defer close(w.news)
		dir := t.TempDir()
		c := Config{Dir: layout.Dir(dir), Server: "http://127.0.0.1:1", Token: "good", URL: "https://127.0.0.1:7070", HTTP: &http.Client{Transport: w}, Log: slog.New(slog.DiscardHandler)}
		h, err := Open(t.Context(), c, Status{})
		if err != nil {
			t.Fatal(err)
		}
		private := make(map[string]bool)
		look := func() {
			t.Helper()
			if left := time.Until(h.listen.NotAfter()); left < pki.HostLasts-refreshBefore-2*time.Minute {
				t.Errorf("the leaf holds for %v", left)
			}
			var has credentials
			text, err := os.ReadFile(layout.Dir(dir).Enrollment())
			if err == nil {
				err = json.Unmarshal(text, &has)
			}
			if err != nil {
				t.Fatal(err)
			}
			private[has.Key] = true
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- h.Run(ctx, func() (Status, error) { return Status{}, nil }) }()
		const runs = 24 * time.Hour
		for begun := time.Now(); time.Since(begun) < runs; {
			time.Sleep(10 * time.Minute)
			synctest.Wait()
			look()
		}
		cancel()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		// One at registration, one at the first heartbeat, which had no token or came
		// after half the hour, and one every half hour.
		if n, want := len(private), int(runs/refreshBefore); n < want-2 || n > want+2 {
			t.Errorf("%d keys in %v, want about %d", n, runs, want)
		}

		time.Sleep(pki.HostLasts + time.Hour)
		if time.Until(h.listen.NotAfter()) > 0 {
			t.Fatal("the leaf did not expire")
		}
		if h, err = Open(t.Context(), c, Status{}); err != nil {
			t.Fatal(err)
		}
		look()
		public := make(map[string]bool)
		for _, key := range w.keys {
			if public[key] {
				t.Error("a key was used for two leaves")
			}
			public[key] = true
		}
		for _, said := range w.said {
			if strings.Contains(said, "PRIVATE KEY") {
				t.Fatalf("the agent sent a private key: %s", said)
			}
			for key := range private {
				if strings.Contains(said, strings.Split(key, "\n")[1]) {
					t.Fatalf("the agent sent a private key: %s", said)
				}
			}
		}
	})
}

// TestControlPlaneRefused checks that an agent sends nothing to a control plane whose
// certificate is not valid.
func TestControlPlaneRefused(t *testing.T) {
	p := newPlane(t)
	asked := 0
	web := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		p.serve(w, r)
	}))
	web.Config.ErrorLog = log.New(io.Discard, "", 0)
	web.StartTLS()
	defer web.Close()
	known := x509.NewCertPool()
	known.AddCert(web.Certificate())
	trusting := func(now time.Time) *http.Client {
		return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: known, Time: func() time.Time { return now }}}}
	}
	port := web.URL[strings.LastIndex(web.URL, ":"):]
	for _, tt := range []struct {
		what, server, why string
		http              *http.Client
	}{
		{"of an unknown authority", web.URL, "unknown authority", nil},
		{"with another name", "https://localhost" + port, "not localhost", trusting(time.Now())},
		{"that is expired", web.URL, "expired", trusting(web.Certificate().NotAfter.Add(time.Second))},
		{"that is in order", web.URL, "", trusting(time.Now())},
	} {
		c := p.config(t, t.TempDir(), "good")
		c.Server, c.HTTP = tt.server, tt.http
		_, err := Open(t.Context(), c, Status{})
		if (err == nil) != (tt.why == "") || err != nil && !strings.Contains(err.Error(), tt.why) {
			t.Errorf("a control plane with a certificate %s: %v", tt.what, err)
		}
		if (asked > 0) != (tt.why == "") {
			t.Errorf("a control plane with a certificate %s got %d requests", tt.what, asked)
		}
	}
}
