package builds

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/recipe"
)

// The phases of a build.
const (
	phasePre     = "pre"
	phaseRecipe  = "recipe"
	phasePost    = "post"
	phaseCapture = "capture"
)

// Commands that run before and after the recipe's steps if the guest has apt-get.
var (
	before = []string{"apt-get update"}
	after  = []string{"apt-get -y autoremove", "apt-get clean", "rm -rf /var/lib/apt/lists/*"}
)

// defaultPath is envd's PATH if nothing sets another.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/games:/usr/local/games"

// entry is one step of a build before it is planned.
type entry struct {
	phase, text string
	step        recipe.Step // of the recipe phase
}

// outline lists the steps of a recipe's build.
func outline(r *recipe.Recipe, skipPrePost bool) []entry {
	var all []entry
	if !skipPrePost {
		for _, line := range before {
			all = append(all, entry{phase: phasePre, text: line})
		}
	}
	for _, step := range r.Steps {
		all = append(all, entry{phase: phaseRecipe, text: step.String(), step: step})
	}
	if !skipPrePost {
		for _, line := range after {
			all = append(all, entry{phase: phasePost, text: line})
		}
	}
	if checked(r) {
		if r.Start != nil {
			all = append(all, entry{phase: phaseCapture, text: r.Start.String()})
		}
		all = append(all, entry{phase: phaseCapture, text: r.HealthCheck.String()})
	}
	return append(all, entry{phase: phaseCapture, text: "capture"})
}

// checked reports whether the recipe has a health check, which means that its template is
// captured running.
func checked(r *recipe.Recipe) bool { return r.HealthCheck != nil && !r.HealthCheck.None }

// surroundings is the environment, folder and user of a command.
type surroundings struct {
	envs      map[string]string
	dir, user string
}

// action is a planned step.
type action struct {
	entry
	surroundings
	// For COPY.
	files *selection
	owner string
	// key identifies the guest's content after this step: the base and all steps so far.
	key [sha256.Size]byte
	// keeps reports that the result is worth a layer.
	keeps bool
}

// plan is the steps of a build and the defaults for processes of its template.
type plan struct {
	actions  []action
	defaults *hostagentv1.Defaults
}

// makePlan plans a recipe's build. The plan depends only on the recipe, on the base,
// which the string base identifies, and on the folder's index.
func makePlan(r *recipe.Recipe, base string, has *hostagentv1.Defaults, index []file, skipPrePost bool) (*plan, error) {
	now := surroundings{envs: maps.Clone(has.GetEnvs()), dir: cmp.Or(has.GetWorkdir(), "/"), user: cmp.Or(has.GetUser(), "root")}
	if now.envs == nil {
		now.envs = map[string]string{}
	}
	lookup := func(name string) (string, bool) {
		v, ok := now.envs[name]
		if !ok && name == "PATH" {
			return defaultPath, true
		}
		return v, ok
	}
	p := &plan{defaults: &hostagentv1.Defaults{User: has.GetUser(), Workdir: has.GetWorkdir()}}
	key := digest("wrenn build 1", base)
	folder := newFolder(index)
	expanded := 0
	for _, e := range outline(r, skipPrePost) {
		a := action{entry: e, surroundings: now}
		var extra []string
		switch s := e.step.(type) {
		case nil:
			a.keeps = e.phase == phasePre
			if e.phase != phaseCapture {
				a.surroundings = surroundings{envs: map[string]string{"DEBIAN_FRONTEND": "noninteractive"}, dir: "/", user: "root"}
			}
		case *recipe.Run:
			a.keeps = true
		case *recipe.Env:
			next := maps.Clone(now.envs)
			for _, v := range s.Vars {
				value, err := v.Value.Expand(lookup)
				if err != nil {
					return nil, err
				}
				if expanded += len(value); expanded > maxExpanded {
					return nil, &recipe.Error{Pos: s.Pos, Message: fmt.Sprintf("the variables' values together exceed %d bytes", maxExpanded)}
				}
				next[v.Name] = value
			}
			if err := checkEnvironment(next); err != nil {
				return nil, &recipe.Error{Pos: s.Pos, Message: err.Error()}
			}
			now.envs = next
		case *recipe.Workdir:
			dir, err := s.Path.Expand(lookup)
			if err != nil {
				return nil, err
			}
			if dir == "" {
				return nil, &recipe.Error{Pos: s.Pos, Message: "WORKDIR is empty after expanding its variables"}
			}
			if !path.IsAbs(dir) {
				dir = path.Join(now.dir, dir)
			}
			now.dir = path.Clean(dir)
			p.defaults.Workdir = now.dir
			a.surroundings = now
		case *recipe.User:
			user, err := s.Name.Expand(lookup)
			if err != nil {
				return nil, err
			}
			if user == "" {
				return nil, &recipe.Error{Pos: s.Pos, Message: "USER is empty after expanding its variables"}
			}
			now.user, p.defaults.User = user, user
			a.surroundings = now
		case *recipe.Copy:
			var err error
			if a.files, a.owner, err = folder.selectFiles(s, now.dir, lookup); err != nil {
				return nil, err
			}
			extra = []string{a.files.target, fmt.Sprint(a.files.folder), a.owner, a.files.digest()}
			a.keeps = true
		}
		parts := append([]string{string(key[:]), e.phase, e.text, a.dir, a.user}, extra...)
		for _, name := range slices.Sorted(maps.Keys(a.envs)) {
			parts = append(parts, name+"="+a.envs[name])
		}
		key = digest(parts...)
		a.key = key
		p.actions = append(p.actions, a)
	}
	p.defaults.Envs = now.envs
	p.defaults.Limits = limitsOf(r, has.GetLimits())
	return p, nil
}

// Limits on a recipe's variables. The server keeps a copy for each step, and the guest's
// kernel accepts only a few megabytes.
const (
	maxVariables   = 1000
	maxEnvironment = 256 << 10 // bytes of names and values
	maxExpanded    = 16 << 20  // bytes of all values that a recipe sets
)

// checkEnvironment refuses an environment that is too large.
func checkEnvironment(envs map[string]string) error {
	size := 0
	for name, value := range envs {
		size += len(name) + len(value)
	}
	if len(envs) > maxVariables || size > maxEnvironment {
		return fmt.Errorf("there are more than %d variables, or they exceed %d bytes together", maxVariables, maxEnvironment)
	}
	return nil
}

// limitsOf returns the limits of r's template: those of the base with r's changes.
func limitsOf(r *recipe.Recipe, base map[string]int64) map[string]int64 {
	limits := maps.Clone(base)
	if r.Limit == nil {
		return limits
	}
	if limits == nil {
		limits = map[string]int64{}
	}
	maps.Copy(limits, r.Limit.Limits)
	maps.DeleteFunc(limits, func(_ string, n int64) bool { return n == 0 })
	return limits
}

// digest hashes parts, each with its length.
func digest(parts ...string) (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, p := range parts {
		_ = binary.Write(h, binary.BigEndian, uint64(len(p))) // never fails
		h.Write([]byte(p))
	}
	h.Sum(sum[:0])
	return sum
}

// userOf returns the user of a "user:group" from USER or --chown.
func userOf(owner string) string {
	user, _, _ := strings.Cut(owner, ":")
	return user
}
