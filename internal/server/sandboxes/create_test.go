package sandboxes

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// TestRequestHash checks that the request for a plain sandbox is hashed as it was in earlier
// releases. Otherwise a client that repeats a request during an upgrade, under the same
// idempotency key, would be refused. A new field needs the tag `json:",omitempty"`.
func TestRequestHash(t *testing.T) {
	got, err := json.Marshal(CreateParams{}.asked())
	want := fmt.Sprintf(`{"Template":"","VCPUs":%d,"MemoryMiB":%d,"DiskMiB":0,"TimeoutSeconds":0,"Envs":null,"Metadata":null,"OnTimeout":"destroy","AutoResume":false}`,
		hostwire.DefaultVCPUs, hostwire.DefaultMemoryMiB)
	if err != nil || string(got) != want {
		t.Errorf("it is %s, want %s; %v", got, want, err)
	}
}
