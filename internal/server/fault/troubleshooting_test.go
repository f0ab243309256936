package fault

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestTroubleshooting checks that the manual has the status of each error code.
func TestTroubleshooting(t *testing.T) {
	page, err := os.ReadFile("../../../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile("(?m)^\\| (`[a-z_`, ]+`) \\| ([0-9, ]+) \\|").FindAllStringSubmatch(string(page), -1)
	if len(rows) < 8 {
		t.Fatalf("the page has %d codes", len(rows))
	}
	for _, row := range rows {
		statuses := strings.Split(row[2], ", ")
		for i, code := range strings.Split(row[1], ", ") {
			if got := strconv.Itoa(Code(strings.Trim(code, "`")).Status()); i >= len(statuses) || got != statuses[i] {
				t.Errorf("%s has the status %s, but the page says %s", code, got, row[2])
			}
		}
	}
}
