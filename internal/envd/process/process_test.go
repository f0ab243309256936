package process

import (
	"log/slog"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/envd/account"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
)

// TestStalledSubscriber checks that a subscriber that reads nothing is dropped, and that
// the others lose nothing.
func TestStalledSubscriber(t *testing.T) {
	who, err := account.Lookup("root")
	if err != nil {
		t.Skip("needs the user root: ", err)
	}
	s := New(Config{Log: slog.New(slog.DiscardHandler), Defaults: func() Defaults { return Defaults{Workdir: "/"} }})
	late := make(chan time.Time)
	s.ticker = func(time.Duration) (<-chan time.Time, func()) { return late, func() {} }
	p, stalled, err := s.start(who, &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "head", Args: []string{"-c", "8388608", "/dev/zero"}}}, 0)
	if err != nil {
		t.Fatal(err)
	}
	sub, err := p.subscribe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		// When only the stalled subscriber delays the process, it has done so for too long.
		full := func() bool { return len(stalled.events) == cap(stalled.events) && len(sub.events) == 0 }
		if !await.Within(await.Hang, full) {
			t.Error("the stalled subscriber does not delay the process")
		}
		select {
		case late <- time.Now():
		case <-p.ended:
		}
	}()
	total := 0
	end := false
	err = p.follow(t.Context(), sub, time.Minute, func(e *pb.ProcessEvent) error {
		total += len(e.GetData().GetStdout())
		end = end || e.GetEnd() != nil
		return nil
	})
	// It may have joined after some output, but not much, because the first subscriber
	// blocked the process.
	if err != nil || !end || total < 6<<20 {
		t.Errorf("the other subscriber got %d bytes, end %v, %v", total, end, err)
	}
	err = p.follow(t.Context(), stalled, time.Minute, func(*pb.ProcessEvent) error { return nil })
	if connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("the stalled subscriber got %v", err)
	}
	select {
	case <-stalled.slow:
	default:
		t.Error("the stalled subscriber was not dropped")
	}
	if err := s.Close(await.Context(t)); err != nil {
		t.Error(err)
	}
	if _, _, err := s.start(who, &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "true"}}, 0); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("a start after the end: %v", err)
	}
}
