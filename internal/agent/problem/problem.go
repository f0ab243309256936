// Package problem keeps the list of what is wrong with a host and its agent
// could not repair. The control plane, wrenn doctor and Prometheus read it.
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

// Kind says what is wrong. Its text stays the same between releases.
type Kind string

// kinds are all kinds with what each means. docs/sharing.md has them too.
var kinds = map[Kind]string{}

func kind(name, meaning string) Kind {
	kinds[Kind(name)] = meaning
	return Kind(name)
}

// The kinds of problems.
var (
	// Unreadable reports data on disk that the agent could not read and keeps.
	Unreadable = kind("unreadable", "data on disk cannot be read, and is kept")
	// Leftover reports files that the agent does not need any more and could not
	// remove.
	Leftover = kind("leftover", "files that nobody needs any more cannot be removed")
	// Firewall reports other programs' rules that drop guests' packets, or own
	// rules that cannot be restored.
	Firewall = kind("firewall", "another program's rules drop guests' packets, or the agent's own cannot be restored")
	// Forwarding reports a host that does not forward IPv4.
	Forwarding = kind("forwarding", "the host does not forward IPv4")
	// Sandbox reports a sandbox whose machine may run and that the agent could not
	// take back yet.
	Sandbox = kind("sandbox", "a sandbox's machine may run, and the agent could not take it back yet")
	// Slot reports a network slot that could not be repaired or removed.
	Slot = kind("slot", "a network slot could not be repaired or removed")
	// Cgroup reports a machine that is out of its control group, and so of its
	// bounds, and could not be put back.
	Cgroup = kind("cgroup", "a machine is out of its control group and could not be put back")
	// Jail reports that QEMUs run with fewer bounds than they could.
	Jail = kind("jail", "virtual machines run with fewer bounds than they could, because a setting says so")
	// Files reports files of a running agent that were removed and could not be
	// restored.
	Files = kind("files", "files of the running agent were removed and could not be restored")
)

// Problem is one thing that is wrong with a host.
type Problem struct {
	Kind Kind `json:"kind"`
	// Object is what of that kind it concerns, such as a network slot's number;
	// empty: the host.
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

// Open starts an empty list, of which the file at path is a copy if there is room
// on the disk.
func Open(path string, log *slog.Logger) *List {
	l := &List{path: path, log: log}
	l.save()
	return l
}

// Report says that something is wrong, until [List.Clear] is called with the
// same kind and object.
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

// Clear says that a problem is over. It does nothing if there was none.
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
	l.log.Info("problem with this host is over", "kind", k, "object", object, "lasted", time.Since(l.all[i].Since).Round(time.Millisecond))
	l.all = slices.Delete(l.all, i, i+1)
	l.save()
}

// Repaired says that something was wrong and is repaired.
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

// All returns the problems that there are, oldest first.
func (l *List) All() []Problem {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all)
}

// Restore writes the list's file again if somebody removed it, and says whether
// that was so.
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

// write needs no sync: the file tells of a running agent.
func (l *List) write() error {
	b, err := json.Marshal(l.all)
	if err != nil {
		return err
	}
	return atomicfile.WriteNoSync(l.path, b, 0o644)
}

// Read returns the problems of the list that an agent keeps at path, or none if
// there is no list: no agent runs. One that was killed has left its last list.
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

var counter = prometheus.NewDesc("wrenn_agent_repairs_total", "What was wrong with the host and the agent has repaired, by kind.", []string{"kind"}, nil)

var gauge = prometheus.NewDesc("wrenn_agent_problems", "What is wrong with the host and the agent could not repair, by kind: "+meanings()+".", []string{"kind"}, nil)

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
