package e2e

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// TestMetricsListeners checks that the server and the agent of `wrenn up` serve their
// metrics on sockets of their own.
func TestMetricsListeners(t *testing.T) {
	dir := layout.Dir(up(t).dir)
	for socket, want := range map[string]string{dir.MetricsSocket(): "\nwrenn_sandboxes{", dir.AgentMetricsSocket(): "\nwrenn_agent_sandboxes{"} {
		resp, err := (&http.Client{Transport: netaddr.Transport("unix:"+socket, false)}).Get("http://wrenn/metrics")
		if err != nil {
			t.Error(err)
			continue
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(b), want) {
			t.Errorf("%s: %s, %v:\n%.500s", socket, resp.Status, err, b)
		}
	}
}
