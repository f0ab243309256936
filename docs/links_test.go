package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	fenced  = regexp.MustCompile("(?ms)^```.*?^```$")
)

// TestLinks checks that every link between the pages leads to an existing page and
// heading.
func TestLinks(t *testing.T) {
	var pages []string
	for _, pattern := range []string{"*.md", "*/*.md", "../*.md", "../examples/*.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, found...)
	}
	links := 0
	for _, page := range pages {
		for _, m := range link.FindAllStringSubmatch(read(t, page), -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			links++
			to := page
			if target != "" {
				to = filepath.Join(filepath.Dir(page), target)
			}
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s links to %s, which does not exist", page, m[1])
				continue
			}
			if anchor != "" && !anchors(read(t, to))[anchor] {
				t.Errorf("%s links to %s, which has no such heading", page, m[1])
			}
		}
	}
	if links < 50 {
		t.Errorf("%d pages have %d links", len(pages), links)
	}
}

// TestReleasedLinks checks that the pages of a release link to no file that it lacks.
func TestReleasedLinks(t *testing.T) {
	script, err := os.ReadFile("../deploy/deb/release")
	if err != nil {
		t.Fatal(err)
	}
	set := regexp.MustCompile(`(?m)^pages=\((.*)\)$`).FindSubmatch(script)
	if set == nil {
		t.Fatal("deploy/deb/release does not say which pages it packs")
	}
	packed := strings.Fields(string(set[1]))
	pages := 0
	for _, name := range packed {
		err := filepath.WalkDir(filepath.Join("..", name), func(page string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || filepath.Ext(page) != ".md" {
				return err
			}
			pages++
			for _, m := range link.FindAllStringSubmatch(read(t, page), -1) {
				target, _, _ := strings.Cut(m[1], "#")
				if target == "" || strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
					continue
				}
				to, err := filepath.Rel("..", filepath.Join(filepath.Dir(page), target))
				if err != nil {
					return err
				}
				if first, _, _ := strings.Cut(to, "/"); !slices.Contains(packed, first) {
					t.Errorf("%s links to %s, which a release lacks", page, to)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if pages < 25 {
		t.Errorf("a release has %d pages", pages)
	}
}

func read(t *testing.T, page string) string {
	t.Helper()
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	return fenced.ReplaceAllString(string(b), "")
}

// anchors returns the anchors of a page's headings, as GitHub generates them.
func anchors(page string) map[string]bool {
	all := make(map[string]bool)
	for _, m := range heading.FindAllStringSubmatch(page, -1) {
		plain := regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(strings.ToLower(m[1]), "")
		all[strings.ReplaceAll(plain, " ", "-")] = true
	}
	return all
}
