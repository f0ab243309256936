package store

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// limits are the queries that count objects to enforce a limit, each with the call that
// must take a lock before.
var limits = map[string]string{
	"CountAPIKeys":         "LockMembers(",
	"CountOwners":          "LockMembers(",
	"CountUserTeams":       "LockUser(",
	"CountChannels":        "LockLimit(",
	"CountAdmins":          "LockBootstrap(",
	"CountUsers":           "LockBootstrap(",
	"InsertBuild":          "LockLimit(",
	"SetTag":               "LockLimit(", // its trigger counts
	"SizeOfArchives":       "LockLimit(",
	"NoteFailedImport":     "LockLimit(",
	"DeleteExcessSessions": "LockUser(",
	"ClaimBuild":           "LockBuilds(",
	"UsedPlace":            "LockPlace(",
}

// counters are the queries that count for another reason.
var counters = map[string]string{
	"CountUsersAudit":        "it removes what there is too much of, and adds nothing",
	"CountRecords":           "RecountRecords counts again",
	"RecountRecords":         "it is no limit",
	"ListPlaces":             "UsedPlace counts again",
	"CountHostLoses":         "an admin sees it",
	"CountHostOnlyTemplates": "an admin sees it",
	"CountOnlineHosts":       "an admin sees it",
	"CountHosts":             "a metric",
	"CountOpenBuilds":        "a metric",
	"CountPendingDeliveries": "a metric",
	"CountLiveSandboxes":     "a metric",
	"RollUsageDay":           "a sum of what was",
	"ListLiveUsage":          "a sum of what was",
	"ListUnusedLayers":       "it removes surplus layers, and adds none",
	"DropTemplatesOfHost":    "it only orders two parts of one statement",
}

// unlocked lists the functions that may call a query of limits without its lock, by file and
// query, with the reason.
var unlocked = map[string]string{
	"auth/ring.go CountUsers":               "its caller has locked",
	"auth/sessions.go DeleteExcessSessions": "its callers lock the user, or have just created it",
	"builds/copy.go SizeOfArchives":         "it refuses early: charge counts again",
	"teams/teams.go CountOwners":            "its caller has locked",
	"templates/capture.go SetTag":           "latest has no limit",
	"templates/import.go SetTag":            "latest has no limit",
	"users/signup.go CountUsers":            "only for display",
}

var (
	counting = regexp.MustCompile(`(?i)\bcount\(|\bsum\(size|\boffset @`)
	function = regexp.MustCompile(`(?m)^func (?:\([^)]*\) )?([A-Za-z0-9_]+)`)
)

// TestCountsAreLocked checks that code which counts objects before it adds one holds a lock,
// so that concurrent calls wait for each other. A new query that counts must be listed here.
// TestLimitsTogether, of package server, makes such calls concurrently.
func TestCountsAreLocked(t *testing.T) {
	files, err := filepath.Glob("queries/*.sql")
	if err != nil {
		t.Fatal(err)
	}
	there := make(map[string]bool)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, query := range strings.Split(string(text), "-- name: ")[1:] {
			name, _, _ := strings.Cut(query, " ")
			there[name] = true
			if counting.MatchString(comment.ReplaceAllString(query, "")) && limits[name] == "" && counters[name] == "" {
				t.Errorf("%s: %s counts: say in limits what is locked before, or in counters why nothing is", file, name)
			}
		}
	}
	for _, list := range []map[string]string{limits, counters} {
		for name := range list {
			if !there[name] {
				t.Errorf("there is no query %s", name)
			}
		}
	}
	calls, used := make(map[string]int), make(map[string]bool)
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text := string(b)
		for name, lock := range limits {
			for _, at := range regexp.MustCompile(`(?:q|[sS]tore)\.`+name+`\(`).FindAllStringIndex(text, -1) {
				calls[name]++
				begun := function.FindAllStringSubmatchIndex(text[:at[0]], -1)
				if len(begun) == 0 {
					t.Errorf("%s calls %s outside of a function", path, name)
					continue
				}
				in := begun[len(begun)-1]
				if strings.Contains(text[in[0]:at[0]], lock) {
					continue
				}
				key := strings.TrimPrefix(path, "../") + " " + name
				if used[key] = true; unlocked[key] == "" {
					t.Errorf("%s, in %s: nothing calls %s before", key, text[in[2]:in[3]], lock)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range limits {
		if calls[name] == 0 {
			t.Errorf("nothing is found to call %s", name)
		}
	}
	for key := range unlocked {
		if !used[key] {
			t.Errorf("%q is excused and need not be", key)
		}
	}
}
