package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/wrenn-dev/wrenn/internal/programs"
)

// targetFormat makes apt print a line for each package index, as parseTargets reads it.
const targetFormat = "$(SITE)|$(CODENAME)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)|$(TRUSTED)"

// source is one of the machine's package sources.
type source struct {
	site, suite string
	components  []string
}

// line returns the source in the form of sources.list(5).
func (s source) line() string {
	return "deb " + s.site + " " + s.suite + " " + strings.Join(s.components, " ")
}

// debianSources returns the machine's package sources of Debian, the main suite first.
// Guests are built from them. It leaves out those of other vendors.
func debianSources(ctx context.Context) ([]source, error) {
	out, err := output(ctx, "", programs.AptGet, "indextargets", "--format", targetFormat, "Created-By: Packages")
	if err != nil {
		return nil, err
	}
	return parseTargets(out)
}

// parseTargets reads lines in targetFormat.
func parseTargets(text string) ([]source, error) {
	var sources []source
	for line := range strings.Lines(text) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 6 || f[4] != "Debian" {
			continue
		}
		site, suite, component := strings.TrimSuffix(f[0], "/"), f[2], f[3]
		if site == "" || suite == "" || component == "" || strings.ContainsAny(site+suite+component, " \t[]$") {
			return nil, fmt.Errorf("apt has an unusable source: %q", line)
		}
		i := slices.IndexFunc(sources, func(s source) bool { return s.site == site && s.suite == suite })
		if i < 0 {
			sources = append(sources, source{site: site, suite: suite})
			i = len(sources) - 1
		}
		if !slices.Contains(sources[i].components, component) {
			sources[i].components = append(sources[i].components, component)
		}
	}
	if len(sources) == 0 {
		return nil, errors.New("apt has no package lists of Debian; run apt-get update")
	}
	// The main suite has the shortest name. Those of updates and security begin with it.
	slices.SortStableFunc(sources, func(a, b source) int { return len(a.suite) - len(b.suite) })
	return sources, nil
}
