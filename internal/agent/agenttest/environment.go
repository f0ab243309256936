package agenttest

import (
	"maps"
	"slices"
	"strings"
	"testing"
)

// Awkward returns variables whose values some programs' formats express only with care.
func Awkward() map[string]string {
	return map[string]string{
		"SPACES": " two  words\t", "QUOTES": `it's "quoted"`, "OPENS": `"a" 'b'`, "ENDS": `a\`, "DOLLAR": "$HOME ${PATH} `id` $(id) !x \\$x",
		"SIGNS": "* ? [a] ~ {b,c} & ; | < > % = @{x} \\n", "EMPTY": "", "UTF8": "ä→", "RETURN": "a\rb", "LONG": strings.Repeat("long ", 600),
		"HASH": "a#b #c", "LINES": "one\ntwo\n",
	}
}

// Inexpressible are those of [Awkward] that pam_env and sudo's env_file cannot express.
var Inexpressible = []string{"HASH", "LINES"}

// CheckEnvironment checks that the output of "env -0" has want, except the variables in
// without, which it must not have.
func CheckEnvironment(t testing.TB, what string, output []byte, want map[string]string, without ...string) {
	t.Helper()
	got := make(map[string]string)
	for pair := range strings.SplitSeq(string(output), "\x00") {
		k, v, _ := strings.Cut(pair, "=")
		got[k] = v
	}
	for _, k := range slices.Sorted(maps.Keys(want)) {
		v, ok := got[k]
		switch {
		case slices.Contains(without, k):
			if ok {
				t.Errorf("%s: %s is %q", what, k, v)
			}
		case !ok:
			t.Errorf("%s: %s is not set", what, k)
		case v != want[k]:
			t.Errorf("%s: %s is %q, not %q", what, k, v, want[k])
		}
	}
}
