package cork

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
)

// TestSet checks that a corked response is not flushed, that the next flush after it
// sends everything, and that the end of the handler does.
func TestSet(t *testing.T) {
	var flushed []string
	steps := func(w http.ResponseWriter, r *http.Request) {
		say := func(text string) {
			_, _ = io.WriteString(w, text)
			w.(http.Flusher).Flush()
		}
		say("a")
		Set(r.Context(), true)
		say("b")
		say("c")
		Set(r.Context(), false)
		say("d")
		Set(r.Context(), true)
		say("e")
	}
	w := httptest.NewRecorder()
	Handler(http.HandlerFunc(steps)).ServeHTTP(&noting{ResponseRecorder: w, flushed: &flushed}, httptest.NewRequest("GET", "/", nil))
	if got, want := flushed, []string{"a", "abcd"}; len(got) != 2 || got[0] != want[0] || got[1] != want[1] || w.Body.String() != "abcde" {
		t.Errorf("flushed %q, written %q", got, w.Body)
	}
	Set(t.Context(), true) // without a handler

	s := httptest.NewServer(Handler(http.HandlerFunc(steps)))
	defer s.Close()
	resp, err := http.Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "abcde" {
		t.Errorf("received %q, %v", b, err)
	}
}

// noting notes what was written before each flush.
type noting struct {
	*httptest.ResponseRecorder
	flushed *[]string
}

func (n *noting) Flush() { *n.flushed = append(*n.flushed, n.Body.String()) }
