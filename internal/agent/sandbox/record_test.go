package sandbox

import (
	"testing"

	"github.com/google/uuid"
)

func FuzzParseRecord(f *testing.F) {
	id := uuid.New()
	for _, state := range []string{`"running","slot":3,"vm":{"id":"` + id.String() + `"}`, `"paused","saved":"` + id.String() + `"`} {
		f.Add([]byte(`{"version":2,"home":"` + id.String() + `","spec":{"id":"` + id.String() + `"},"disks":2,"sealed":1,"state":` + state + `}`))
	}
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord("sandbox.json", b, id)
		if err == nil && r.State == Running && (r.Slot == nil || r.VM == nil) {
			t.Error("parseRecord accepts a running sandbox without slot or machine")
		}
		if err == nil && r.State == Paused && (r.Saved == nil || r.Disks < 1 || r.Sealed > r.Disks) {
			t.Error("parseRecord accepts a paused sandbox without its saved state")
		}
	})
}
