package process

import (
	"context"

	"github.com/wrenn-dev/wrenn/internal/cork"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
)

// paced wraps send: the end event leaves together with the end of the stream, when the
// handler returns. With holdStart, the start event leaves together with the next event.
func paced(ctx context.Context, holdStart bool, send func(*pb.ProcessEvent) error) func(*pb.ProcessEvent) error {
	return func(e *pb.ProcessEvent) error {
		switch e.GetEvent().(type) {
		case *pb.ProcessEvent_Start:
			cork.Set(ctx, holdStart)
		case *pb.ProcessEvent_End:
			cork.Set(ctx, true)
		default:
			cork.Set(ctx, false)
		}
		return send(e)
	}
}
