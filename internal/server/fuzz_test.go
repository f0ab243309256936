package server_test

import (
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// fuzzer is an identity that makes requests.
type fuzzer struct {
	// credential returns the name and value of the header that authenticates it.
	credential func(p *plane) (header, value string)
	// phases are schemathesis's phases for a short run.
	phases string
	// sees is a path that it must still be able to read after the requests.
	sees string
	// succeed is how many operations must succeed at least once. Otherwise nobody would
	// notice that the server refuses most requests at the door.
	succeed int
}

// Most requests come from the coverage phase, which tries each bound of the document.
// They do not depend on the identity, so a short run makes them only as the one with most
// rights.
var fuzzers = map[string]fuzzer{
	"key": {func(p *plane) (string, string) { return "X-API-Key", p.newTeam() }, "examples,fuzzing,stateful", "/v1/sandboxes", 30},
	"session": {func(p *plane) (string, string) {
		bearer := p.bearer(p.person("ada@example.com"))
		p.call("POST", "/v1/teams", map[string]any{"name": "ada's"}, as(bearer)...).want(201)
		return "Authorization", "Bearer " + bearer
	}, "examples,fuzzing,stateful", "/v1/me", 40},
	"admin": {func(p *plane) (string, string) {
		access, _ := p.login("admin@example.com", "correct horse")
		return "Authorization", "Bearer " + access
	}, "examples,coverage,fuzzing,stateful", "/v1/admin/teams", 60},
}

// TestFuzz runs schemathesis on the OpenAPI document as a program with a key, as a user,
// and as the platform's admin, and checks each response. WRENN_SLOW makes many more
// requests, from several seeds.
func TestFuzz(t *testing.T) {
	t.Parallel()
	st := needs(t, tools, "st")
	seeds, examples := []int{1}, 5
	slow := os.Getenv("WRENN_SLOW") != ""
	if slow {
		seeds, examples = []int{1, 2, 3}, 100
	}
	for name, f := range fuzzers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			phases := f.phases
			if slow {
				phases = "examples,coverage,fuzzing,stateful"
			}
			for _, seed := range seeds {
				p := newPlane(t)
				header, value := f.credential(p)
				p.call("PUT", "/v1/admin/settings", map[string]any{"signup_open": true, "default_quota": map[string]any{}}).want(200)
				cmd := exec.CommandContext(t.Context(), st, "run", "--url", p.http.URL, "--no-color",
					"--seed", strconv.Itoa(seed), "--max-examples", strconv.Itoa(examples), "--phases", phases, "../../api/openapi.yaml")
				cmd.Dir = absolute("../../test/fuzz")
				cmd.Env = append(os.Environ(), "HYPOTHESIS_STORAGE_DIRECTORY="+absolute("../../.cache/hypothesis"), "WRENN_FUZZ_HEADER="+header, "WRENN_FUZZ_CREDENTIAL="+value, "WRENN_FUZZ_SPARE=Bearer "+p.bearer(p.person("spare@example.com")))
				begun := time.Now()
				out, err := cmd.CombinedOutput()
				said := strings.TrimSpace(string(out))
				if err != nil {
					t.Errorf("schemathesis, seed %d: %v\n%s", seed, err, said)
				}
				t.Logf("seed %d: %s, %v", seed, found(said, `(?m)^ *(\d+ generated.*)$`), time.Since(begun).Round(time.Second))
				// The identity kept its rights to the end, so the responses were not just
				// refusals.
				p.call("GET", f.sees, nil, "X-API-Key", "", header, value).want(200)
				if n := p.carriedOut(); n < f.succeed {
					t.Errorf("%d operations succeeded, want at least %d", n, f.succeed)
				} else {
					t.Logf("%d operations succeeded", n)
				}
				p.end()
			}
		})
	}
}

func found(text, pattern string) string {
	m := regexp.MustCompile(pattern).FindStringSubmatch(text)
	if m == nil {
		return "nothing"
	}
	return m[1]
}

// carriedOut counts the operations that succeeded at least once.
func (p *plane) carriedOut() int {
	p.Helper()
	routes := make(map[string]bool)
	line := regexp.MustCompile(`(?m)^wrenn_http_requests_total\{(method="[A-Z]+",route="/v1/[^"]*"),status="2\d\d"\}`)
	for _, m := range line.FindAllSubmatch([]byte(p.metrics()), -1) {
		routes[string(m[1])] = true
	}
	return len(routes)
}
