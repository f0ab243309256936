package rest

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/wrenn-dev/wrenn/api"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
)

const (
	// checkWithin is how long a check of /health may take.
	checkWithin = 2 * time.Second
	// checkLasts is how long its answer stands: anybody may ask, as often as
	// they like.
	checkLasts = time.Second
)

// health asks whether everything that the service needs answers.
type health struct {
	checks map[string]func(context.Context) error

	mu     sync.Mutex
	at     time.Time
	answer rest.Health
}

func (h *health) check(ctx context.Context) rest.Health {
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Since(h.at) < checkLasts {
		return h.answer
	}
	// Not the asker's context: the answer is for others too.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkWithin)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	a := rest.Health{Status: rest.HealthStatusOk, Checks: make(map[string]string)}
	for name, check := range h.checks {
		wg.Go(func() {
			err := check(ctx)
			mu.Lock()
			defer mu.Unlock()
			a.Checks[name] = "ok"
			if err != nil {
				// No more than that: anybody may ask.
				a.Checks[name] = "unreachable"
				a.Status = rest.HealthStatusUnavailable
			}
		})
	}
	wg.Wait()
	h.at, h.answer = time.Now(), a
	return a
}

// GetHealth answers GET /health.
func (a *API) GetHealth(w http.ResponseWriter, r *http.Request) {
	h := a.health.check(r.Context())
	status := http.StatusOK
	if h.Status != rest.HealthStatusOk {
		status = http.StatusServiceUnavailable
	}
	answer(w, status, h)
}

// GetOpenAPI answers GET /openapi.yaml.
func (a *API) GetOpenAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/yaml")
	_, _ = w.Write(api.OpenAPI)
}
