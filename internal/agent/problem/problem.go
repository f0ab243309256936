// Package problem keeps the list of a host's problems that the agent could not repair.
// The control plane, wrenn doctor and Prometheus read it.
package problem

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
)

// Kind is a kind of problem. Its text stays the same between releases.
type Kind string

// kinds has the meaning of each kind. docs/sharing.md describes them too.
var kinds = map[Kind]string{}

func kind(name, meaning string) Kind {
	kinds[Kind(name)] = meaning
	return Kind(name)
}

// The kinds of problems.
var (
	// Unreadable reports data on disk that the agent could not read and keeps.
	Unreadable = kind("unreadable", "data on disk cannot be read, and is kept")
	// Leftover reports files that the agent no longer needs but could not remove.
	Leftover = kind("leftover", "files that are no longer needed cannot be removed")
	// Firewall reports other programs' rules that drop guests' packets, or rules of the
	// agent that it cannot restore.
	Firewall = kind("firewall", "another program's rules drop guests' packets, or the agent's own cannot be restored")
	// Forwarding reports a host that does not forward IPv4.
	Forwarding = kind("forwarding", "the host does not forward IPv4")
	// Sandbox reports a sandbox whose machine may run and that the agent could not adopt
	// yet.
	Sandbox = kind("sandbox", "a sandbox's machine may run, and the agent could not adopt it yet")
	// Slot reports a network slot that could not be repaired or removed.
	Slot = kind("slot", "a network slot could not be repaired or removed")
	// Cgroup reports a machine outside of its control group, and so without its limits,
	// that the agent could not put back.
	Cgroup = kind("cgroup", "a machine is outside of its control group and could not be put back")
	// Jail reports that a setting turns off a part of the jail of virtual machines.
	Jail = kind("jail", "a setting turns off a part of the jail of virtual machines")
	// Files reports files of a running agent that were removed and could not be
	// restored.
	Files = kind("files", "files of the running agent were removed and could not be restored")
)

// Problem is one thing that is wrong with a host.
type Problem struct {
	Kind Kind `json:"kind"`
	// Object identifies what the problem concerns, such as a network slot's number. It is
	// empty for the host itself.
	Object string `json:"object,omitempty"`
	// Message says what happened and what to do, for an admin.
	Message string    `json:"message"`
	Since   time.Time `json:"since"`
}

func (p Problem) is(k Kind, object string) bool { return p.Kind == k && p.Object == object }

// List is the list of a host's problems. Its methods are safe for concurrent
// use, and a nil *List keeps nothing.
type List struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex
	all     []Problem // oldest first
	repairs map[Kind]int
}

// Open starts an empty list and keeps a copy of it in the file at path, if the disk has
// room.
func Open(path string, log *slog.Logger) *List {
	l := &List{path: path, log: log}
	l.save()
	return l
}

// Report adds a problem to the list, or updates the message of the one with this kind
// and object. It stays until [List.Clear].
func (l *List) Report(k Kind, object, message string) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.IndexFunc(l.all, func(p Problem) bool { return p.is(k, object) })
	switch {
	case i < 0:
		l.all = append(l.all, Problem{Kind: k, Object: object, Message: message, Since: time.Now().UTC()})
	case l.all[i].Message == message:
		return
	default:
		l.all[i].Message = message
	}
	l.log.Error("problem with this host", "kind", k, "object", object, "message", message)
	l.save()
}

// Clear removes a problem from the list. It does nothing if there is none.
func (l *List) Clear(k Kind, object string) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.IndexFunc(l.all, func(p Problem) bool { return p.is(k, object) })
	if i < 0 {
		return
	}
	l.log.Info("problem with this host is solved", "kind", k, "object", object, "lasted", time.Since(l.all[i].Since).Round(time.Millisecond))
	l.all = slices.Delete(l.all, i, i+1)
	l.save()
}

// Repaired logs and counts a problem that the agent repaired at once.
func (l *List) Repaired(k Kind, object, message string) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.repairs == nil {
		l.repairs = map[Kind]int{}
	}
	l.repairs[k]++
	l.log.Warn("repaired this host", "kind", k, "object", object, "message", message)
}

// All returns the present problems, oldest first.
func (l *List) All() []Problem {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all)
}

// Restore writes the list's file again if somebody removed it, and reports whether
// somebody did.
func (l *List) Restore() (lost bool, err error) {
	if _, err := os.Stat(l.path); !errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.write(); err != nil {
		return true, fmt.Errorf("restore list of problems: %w", err)
	}
	return true, nil
}

// Close removes the list's file.
func (l *List) Close() error {
	if err := os.Remove(l.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove list of problems: %w", err)
	}
	return nil
}

func (l *List) save() {
	if err := l.write(); err != nil {
		l.log.Error("cannot write the list of problems", "error", err)
	}
}

// write does not sync, because the file matters only while the agent runs.
func (l *List) write() error {
	b, err := json.Marshal(l.all)
	if err != nil {
		return err
	}
	return atomicfile.WriteNoSync(l.path, b, 0o644)
}

// Read returns the problems in the file of an agent's list, or none without a file,
// which means that no agent runs. A killed agent leaves its last list.
func Read(path string) ([]Problem, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read list of problems: %w", err)
	}
	var all []Problem
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, fmt.Errorf("read list of problems: %w", err)
	}
	return all, nil
}

var counter = prometheus.NewDesc("wrenn_agent_repairs_total", "Problems of the host that the agent repaired, by kind.", []string{"kind"}, nil)

var gauge = prometheus.NewDesc("wrenn_agent_problems", "Problems of the host that the agent could not repair, by kind: "+meanings()+".", []string{"kind"}, nil)

func meanings() string {
	var all []string
	for k, meaning := range kinds {
		all = append(all, string(k)+": "+meaning)
	}
	slices.Sort(all)
	return strings.Join(all, "; ")
}

// Describe implements [prometheus.Collector].
func (l *List) Describe(ch chan<- *prometheus.Desc) {
	ch <- gauge
	ch <- counter
}

// Collect implements [prometheus.Collector]. Kinds without a problem are 0.
func (l *List) Collect(ch chan<- prometheus.Metric) {
	n := map[Kind]int{}
	l.mu.Lock()
	for _, p := range l.all {
		n[p.Kind]++
	}
	repairs := maps.Clone(l.repairs)
	l.mu.Unlock()
	for k := range kinds {
		ch <- prometheus.MustNewConstMetric(gauge, prometheus.GaugeValue, float64(n[k]), string(k))
		ch <- prometheus.MustNewConstMetric(counter, prometheus.CounterValue, float64(repairs[k]), string(k))
	}
}
