package guest

import (
	"encoding/binary"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
)

// TestLongMessage checks that the client refuses a message longer than any that the guest
// daemon sends, instead of buffering it.
func TestLongMessage(t *testing.T) {
	for name, tt := range map[string]struct {
		size    int
		refused bool
	}{
		"the daemon's longest": {32 << 10, false},
		"longer":               {128 << 10, true},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := fake(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/connect+proto")
				for _, e := range []*pb.ProcessEvent{
					{Event: &pb.ProcessEvent_Start{Start: &pb.ProcessEvent_StartEvent{Pid: 7}}},
					{Event: &pb.ProcessEvent_Data{Data: &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Stdout{Stdout: make([]byte, tt.size)}}}},
				} {
					b, err := proto.Marshal(&pb.StartResponse{Event: e})
					if err != nil {
						t.Error(err)
					}
					_, _ = w.Write(append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(b))), b...))
				}
			})
			p, err := c.Start(await.Context(t), sh("true"), nil, false)
			if err != nil {
				t.Fatal(err)
			}
			out, err := p.Next()
			p.ended = true // There is no process to kill.
			p.Close()
			if tt.refused && (err == nil || !strings.Contains(err.Error(), connect.CodeResourceExhausted.String())) || !tt.refused && (err != nil || len(out.Stdout) != tt.size) {
				t.Errorf("%d bytes, %v", len(out.Stdout), err)
			}
		})
	}
}
