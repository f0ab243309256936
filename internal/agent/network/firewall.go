package network

import (
	"context"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/wrenn-dev/wrenn/internal/programs"
)

// Obstacles describes other programs' firewall chains on this machine that may drop guests'
// packets. Our rules cannot override them.
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
			found = append(found, fmt.Sprintf("the firewall's chain %s %s %s drops forwarded packets by default: add rules that accept packets from %s* and replies to them", family, c.Table.Name, c.Name, linkPrefix))
		}
	}
	return found
}

// endsInDrop reports whether the last rule of a chain drops or rejects every packet, as
// firewalld's does.
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
			return false // it matches only some packets
		}
	}
	return drops
}

// dockerRules accept guests' packets, which Docker's rules otherwise drop. DOCKER-USER is
// Docker's chain for rules of others.
var dockerRules = [][]string{
	{"DOCKER-USER", "-i", linkPrefix + "+", "-j", "ACCEPT"},
	{"DOCKER-USER", "-o", linkPrefix + "+", "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"},
}

// passDocker adds missing rules to Docker's chain, if that exists, and reports whether it
// added any. It runs iptables as Docker does, because native nftables rules would make the
// table unreadable for iptables.
func passDocker(ctx context.Context) (added bool, err error) {
	if !iptables(ctx, "-n", "-L", "DOCKER-USER") {
		return false, nil
	}
	for _, r := range dockerRules {
		if iptables(ctx, append([]string{"-C"}, r...)...) {
			continue
		}
		if !iptables(ctx, append([]string{"-I"}, r...)...) {
			return added, fmt.Errorf("add rule: iptables -I %s failed", strings.Join(r, " "))
		}
		added = true
	}
	return added, nil
}

// leaveDocker removes the rules for Docker.
func leaveDocker(ctx context.Context) {
	for _, r := range dockerRules {
		for range 8 { // a rule may exist several times
			if !iptables(ctx, append([]string{"-D"}, r...)...) {
				break
			}
		}
	}
}

// iptables runs iptables and reports whether it succeeded.
func iptables(ctx context.Context, args ...string) bool {
	ctx, cancel := context.WithTimeout(ctx, nftTimeout)
	defer cancel()
	return programs.Iptables.CommandContext(ctx, append([]string{"-w", "5"}, args...)...).Run() == nil
}
