package image

import "testing"

func TestParseTargets(t *testing.T) {
	got, err := parseTargets("http://a.example/debian/|bookworm|bookworm-updates|main|Debian|\n" +
		"http://a.example/debian/|bookworm|bookworm|main|Debian|\n" +
		"http://a.example/debian/|bookworm|bookworm|contrib|Debian|\n" +
		"http://b.example/x|x|x|main|Somebody|\n")
	if err != nil || len(got) != 2 || got[0].line() != "deb http://a.example/debian bookworm main contrib" || got[1].suite != "bookworm-updates" {
		t.Errorf("got %v, %v", got, err)
	}
	for _, bad := range []string{"", "x|x|x|main|Somebody|\n", "http://a b|x|x|main|Debian|\n"} {
		if got, err := parseTargets(bad); err == nil {
			t.Errorf("%q gives %v", bad, got)
		}
	}
}

func FuzzParseTargets(f *testing.F) {
	f.Add("s|x|x|main|Debian|")
	f.Fuzz(func(t *testing.T, s string) {
		if got, err := parseTargets(s); err == nil && len(got) == 0 {
			t.Error("it returned neither sources nor an error")
		}
	})
}
