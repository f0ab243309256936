package network

import (
	"context"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/wrenn-dev/wrenn/internal/programs"
)

// Obstacles are other programs' firewall chains on this machine that may drop
// what guests send or get: a rule of ours can close a door, not open one that
// somebody else's closes.
func Obstacles() []string {
	conn, err := nftables.New()
	if err != nil {
		return nil
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil
	}
	var found []string
	for _, c := range chains {
		if c.Table == nil || c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookForward {
			continue
		}
		family, ok := map[nftables.TableFamily]string{nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip"}[c.Table.Family]
		if !ok || c.Table.Name == "wrenn" || strings.HasPrefix(c.Table.Name, "wrenn-") {
			continue
		}
		if c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop || endsInDrop(conn, c) {
			found = append(found, fmt.Sprintf("the firewall's chain %s %s %s drops what it forwards unless a rule there accepts it: accept what comes in from %s*, and replies to it", family, c.Table.Name, c.Name, linkPrefix))
		}
	}
	return found
}

// endsInDrop tells whether the last rule of a chain drops or rejects whatever
// comes to it, as firewalld's does.
func endsInDrop(conn *nftables.Conn, c *nftables.Chain) bool {
	rules, err := conn.GetRules(c.Table, c)
	if err != nil || len(rules) == 0 {
		return false
	}
	drops := false
	for _, e := range rules[len(rules)-1].Exprs {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Reject:
			drops = true
		case *expr.Verdict:
			drops = e.Kind == expr.VerdictDrop
		default:
			return false // it matches some packets only
		}
	}
	return drops
}

// dockerRules let guests' packets pass Docker's rules, which drop what they do
// not know. DOCKER-USER is the chain that Docker leaves to others.
var dockerRules = [][]string{
	{"DOCKER-USER", "-i", linkPrefix + "+", "-j", "ACCEPT"},
	{"DOCKER-USER", "-o", linkPrefix + "+", "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"},
}

// passDocker adds the rules for Docker where its chain is and they are not, and
// says whether it added any. It runs the program that Docker itself uses: rules
// that iptables cannot read would break all of its table.
func passDocker(ctx context.Context) (added bool, err error) {
	if !iptables(ctx, "-n", "-L", "DOCKER-USER") {
		return false, nil
	}
	for _, r := range dockerRules {
		if iptables(ctx, append([]string{"-C"}, r...)...) {
			continue
		}
		if !iptables(ctx, append([]string{"-I"}, r...)...) {
			return added, fmt.Errorf("cannot add a rule: iptables -I %s", strings.Join(r, " "))
		}
		added = true
	}
	return added, nil
}

// leaveDocker removes the rules for Docker.
func leaveDocker(ctx context.Context) {
	for _, r := range dockerRules {
		for range 8 { // each as often as it is there
			if !iptables(ctx, append([]string{"-D"}, r...)...) {
				break
			}
		}
	}
}

// iptables runs iptables and says whether it succeeded.
func iptables(ctx context.Context, args ...string) bool {
	ctx, cancel := context.WithTimeout(ctx, nftTimeout)
	defer cancel()
	return programs.Iptables.CommandContext(ctx, append([]string{"-w", "5"}, args...)...).Run() == nil
}
