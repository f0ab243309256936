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
	// checkWithin bounds a check of /health.
	checkWithin = 2 * time.Second
	// checkLasts is how long a result is cached, because anybody may call /health at any
	// rate.
	checkLasts = time.Second
)

// health checks whether everything that the service needs responds.
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
	// Do not use the caller's context: others share the result.
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
				// No details, because anybody may call this.
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
