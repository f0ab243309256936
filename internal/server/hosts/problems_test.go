package hosts

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

// TestProblems bounds the problems that a hostile host reports.
func TestProblems(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	said := []*hostagentv1.Problem{
		{Kind: "firewall", Object: "slot 3", Message: "x", Since: timestamppb.New(now.Add(-time.Hour))},
		{Kind: strings.Repeat("ü", 500), Message: "a\x00b\xff\x1b[2J" + strings.Repeat("ü", 5000), Since: timestamppb.New(now.Add(time.Hour))},
		{Since: &timestamppb.Timestamp{Seconds: 1 << 60}},
		nil,
	}
	for range 1000 {
		said = append(said, &hostagentv1.Problem{})
	}
	b := encodeProblems(said, now)
	if len(b) > 64<<10 {
		t.Errorf("%d bytes", len(b))
	}
	if strings.Contains(string(b), `\u0000`) || !utf8.Valid(b) {
		t.Errorf("PostgreSQL would refuse %q", b)
	}
	got := Problems(db.Host{Problems: b})
	if len(got) != maxProblems {
		t.Fatalf("%d problems", len(got))
	}
	if want := (Problem{"firewall", "slot 3", "x", now.Add(-time.Hour)}); got[0] != want {
		t.Errorf("got %v, want %v", got[0], want)
	}
	for i, p := range got {
		if utf8.RuneCountInString(p.Kind) > maxProblemWord || utf8.RuneCountInString(p.Message) > maxProblemMessage || p.Since.After(now) {
			t.Errorf("%d: %v", i, p)
		}
	}
	if !strings.HasPrefix(got[1].Message, "a b\uFFFD [2J") {
		t.Errorf("message %q", got[1].Message[:20])
	}
	if got := Problems(db.Host{Problems: encodeProblems(nil, now)}); len(got) != 0 {
		t.Errorf("got %v of nothing", got)
	}
}
