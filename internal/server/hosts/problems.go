package hosts

import (
	"encoding/json"
	"strings"
	"time"
	"unicode"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

// Limits on the problems of one host, because a host may be hostile.
const (
	maxProblems       = 64
	maxProblemWord    = 64   // characters of a kind or an object
	maxProblemMessage = 1024 // characters
)

// Problem is a problem that a host's agent reported.
type Problem struct {
	Kind    string    `json:"kind"`
	Object  string    `json:"object,omitempty"`
	Message string    `json:"message"`
	Since   time.Time `json:"since"`
}

// Problems returns the problems that a host's agent last reported.
func Problems(row db.Host) []Problem {
	var all []Problem
	if err := json.Unmarshal(row.Problems, &all); err != nil {
		return nil // Only encodeProblems writes the column.
	}
	return all
}

// encodeProblems bounds the problems that an agent reported and encodes them as JSON.
func encodeProblems(said []*hostagentv1.Problem, now time.Time) []byte {
	all := make([]Problem, 0, min(len(said), maxProblems))
	for _, p := range said[:cap(all)] {
		since := p.GetSince().AsTime()
		if since.After(now) || now.Sub(since) > 10*365*24*time.Hour {
			since = now
		}
		all = append(all, Problem{
			Kind: bound(p.GetKind(), maxProblemWord), Object: bound(p.GetObject(), maxProblemWord),
			Message: bound(p.GetMessage(), maxProblemMessage), Since: since.UTC(),
		})
	}
	b, err := json.Marshal(all)
	if err != nil {
		return []byte("[]") // Marshal does not fail for strings and times.
	}
	return b
}

// bound truncates text to n characters and replaces control characters with spaces.
func bound(text string, n int) string {
	var b strings.Builder
	for _, r := range text { // invalid UTF-8 becomes U+FFFD
		if n == 0 {
			break
		}
		if unicode.IsControl(r) {
			r = ' '
		}
		b.WriteRune(r)
		n--
	}
	return b.String()
}
