package cli

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

// as makes a command of what somebody who is logged in does.
func (a *app) as(cmd *cobra.Command, out *output, do func(ctx context.Context, p *person, args []string) error) *cobra.Command {
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := a.person(cmd.Context())
		if err != nil {
			return err
		}
		defer p.end()
		return do(cmd.Context(), p, args)
	}
	if out != nil {
		out.flag(cmd)
	}
	return cmd
}

func (a *app) keyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "key", Short: "A team's API keys", Long: "A team's API keys. `wrenn login` first, or be root where `wrenn up` runs."}
	cmd.AddCommand(a.keyCurrentCommand(), a.keyCreateCommand(), a.keyListCommand(), a.keyRemoveCommand(), a.keyRotateSecretCommand())
	return cmd
}

// adminKey is the variable of the first admin's API key in the server's environment file.
const adminKey = "WRENN_ADMIN_API_KEY"

func (a *app) keyCurrentCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "current", Short: "Print the API key that the commands use", Args: exactly(0),
		Long: `Print the API key that the commands use: that of --api-key or WRENN_API_KEY, else
that of ` + "`wrenn login`" + `, else that of ` + "`wrenn up`" + ` on this machine. With --file, print the
first admin's, from the server's environment file.`,
		RunE: func(*cobra.Command, []string) (err error) {
			var key string
			if file != "" {
				key, err = variable(file, adminKey)
			} else {
				_, key, err = a.service()
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.out, key)
			return err
		},
	}
	cmd.Flags().StringVar(&file, "file", "", "the server's environment file, such as /etc/wrenn/server.env")
	return cmd
}

// variable returns the value of a variable in one of systemd's environment files.
func variable(file, name string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+"="); ok {
			return strings.Trim(value, `"'`), nil
		}
	}
	return "", fmt.Errorf("%s does not set %s", file, name)
}

func (a *app) keyCreateCommand() *cobra.Command {
	var out output
	var scopes []string
	var expires time.Duration
	cmd := a.as(&cobra.Command{
		Use: "create NAME", Short: "Make an API key and print it, this once", Args: exactly(1),
	}, &out, func(ctx context.Context, p *person, args []string) error {
		o := client.KeyOptions{Name: args[0], Scopes: scopes}
		if expires < 0 {
			return usage("--expires %s: want a time to come", expires)
		}
		if expires > 0 {
			at := time.Now().Add(expires).UTC()
			o.ExpiresAt = &at
		}
		k, err := p.CreateKey(ctx, o)
		if err != nil {
			return err
		}
		return a.made(out, k, k.Key)
	})
	cmd.Flags().StringSliceVar(&scopes, "scope", nil, "what it is for: sandboxes, templates, read-only, platform; repeatable (default: sandboxes and templates)")
	cmd.Flags().DurationVar(&expires, "expires", 0, "how long it holds, as in 720h (default: until it is revoked)")
	return cmd
}

func (a *app) keyListCommand() *cobra.Command {
	var out output
	return a.as(&cobra.Command{Use: "ls", Short: "List API keys", Args: exactly(0)}, &out, func(ctx context.Context, p *person, _ []string) error {
		keys, err := p.Keys(ctx)
		if err != nil {
			return err
		}
		if out.format == "json" {
			if keys == nil {
				keys = []client.Key{}
			}
			return a.json(keys)
		}
		rows := [][]string{{"ID", "NAME", "PREFIX", "SCOPES", "MADE BY", "LAST USED", "EXPIRES"}}
		for _, k := range keys {
			rows = append(rows, []string{k.ID, k.Name, k.Prefix + "…", first(strings.Join(k.Scopes, ","), "all"), k.CreatedBy, day(k.LastUsedAt), day(k.ExpiresAt)})
		}
		return a.table(rows)
	})
}

// day is a time as lists have it.
func day(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return t.Local().Format(time.DateTime)
}

func (a *app) keyRemoveCommand() *cobra.Command {
	return a.as(&cobra.Command{Use: "rm KEY...", Short: "Revoke API keys, by id", Args: atLeast(1)}, nil, func(ctx context.Context, p *person, args []string) error {
		for _, k := range args {
			if err := p.RevokeKey(ctx, k); err != nil {
				return fmt.Errorf("%s: %w", k, err)
			}
			fmt.Fprintln(a.out, k)
		}
		return nil
	})
}

func (a *app) teamCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "team", Short: "Who works together",
		Long: "Who works together. `wrenn login` first, or be root where `wrenn up` runs. TEAM is a team's id or name; absent, the one that you work with.",
	}
	cmd.AddCommand(a.teamListCommand(), a.teamCreateCommand(), a.teamSwitchCommand(), a.teamRenameCommand(), a.teamRemoveCommand(), a.teamLeaveCommand(),
		a.teamMembersCommand(), a.teamInviteCommand(), a.teamRoleCommand(), a.teamExpelCommand())
	return cmd
}

// teamOf is the team of the caller's that a word names, by id or by name; "" is
// the first.
func teamOf(ctx context.Context, c *client.Client, word string) (*client.Team, error) {
	teams, err := c.Teams(ctx)
	if err != nil {
		return nil, err
	}
	var found []client.Team
	for _, t := range teams {
		if word == "" || t.ID == word {
			return &t, nil
		}
		if t.Name == word {
			found = append(found, t)
		}
	}
	switch {
	case word == "":
		return nil, fmt.Errorf("you are in no team")
	case len(found) == 0:
		return nil, fmt.Errorf("you are in no team %q", word)
	case len(found) > 1:
		return nil, fmt.Errorf("%d of your teams are named %q: say which by its id", len(found), word)
	}
	return &found[0], nil
}

// team is the one that the first argument names, or else the one worked with.
func (p *person) teamNamed(ctx context.Context, args []string) (*client.Team, error) {
	if len(args) == 0 {
		return teamOf(ctx, p.Client, p.team)
	}
	return teamOf(ctx, p.Client, args[0])
}

func (a *app) teamListCommand() *cobra.Command {
	var out output
	return a.as(&cobra.Command{Use: "ls", Short: "List your teams", Args: exactly(0)}, &out, func(ctx context.Context, p *person, _ []string) error {
		teams, err := p.Teams(ctx)
		if err != nil {
			return err
		}
		if out.format == "json" {
			return a.json(teams)
		}
		rows := [][]string{{"", "ID", "NAME", "ROLE"}}
		for _, t := range teams {
			mark := ""
			if t.ID == p.team {
				mark = "*"
			}
			rows = append(rows, []string{mark, t.ID, t.Name, t.Role})
		}
		return a.table(rows)
	})
}

func (a *app) teamCreateCommand() *cobra.Command {
	var out output
	return a.as(&cobra.Command{Use: "create NAME", Short: "Make a team, whose owner you are", Args: exactly(1)}, &out, func(ctx context.Context, p *person, args []string) error {
		t, err := p.CreateTeam(ctx, args[0])
		if err != nil {
			return err
		}
		return a.made(out, t, t.ID)
	})
}

func (a *app) teamSwitchCommand() *cobra.Command {
	return a.as(&cobra.Command{
		Use: "switch TEAM", Short: "Work with another team from now on", Args: exactly(1),
		Long: "Work with another team from now on: a key of that team takes the place of the one that `wrenn login` made, which is revoked.",
	}, nil, func(ctx context.Context, p *person, args []string) error {
		if p.login == nil {
			return fmt.Errorf("the machine's own credentials are for one team: `wrenn login` first")
		}
		if err := p.login.use(ctx, args[0]); err != nil {
			return err
		}
		_, err := fmt.Fprintln(a.out, clean(p.login.Team))
		return err
	})
}

func (a *app) teamRenameCommand() *cobra.Command {
	return a.as(&cobra.Command{Use: "rename TEAM NAME", Short: "Give a team another name", Args: exactly(2)}, nil, func(ctx context.Context, p *person, args []string) error {
		t, err := p.teamNamed(ctx, args)
		if err == nil {
			t, err = p.RenameTeam(ctx, t.ID, args[1])
		}
		if err != nil {
			return err
		}
		return a.table([][]string{{t.ID, t.Name}})
	})
}

func (a *app) teamRemoveCommand() *cobra.Command {
	return a.as(&cobra.Command{Use: "rm TEAM", Short: "Delete a team with its sandboxes, templates and keys", Args: exactly(1)}, nil, func(ctx context.Context, p *person, args []string) error {
		t, err := p.teamNamed(ctx, args)
		if err == nil {
			err = p.DeleteTeam(ctx, t.ID)
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(a.out, t.ID)
		return err
	})
}

func (a *app) teamLeaveCommand() *cobra.Command {
	return a.as(&cobra.Command{Use: "leave TEAM", Short: "Leave a team; the keys that you made for it are revoked", Args: exactly(1)}, nil, func(ctx context.Context, p *person, args []string) error {
		t, err := p.teamNamed(ctx, args)
		if err == nil {
			err = p.LeaveTeam(ctx, t.ID)
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(a.out, t.ID)
		return err
	})
}

func (a *app) teamMembersCommand() *cobra.Command {
	var out output
	return a.as(&cobra.Command{Use: "members [TEAM]", Short: "List who is in a team", Args: noMore(1)}, &out, func(ctx context.Context, p *person, args []string) error {
		t, err := p.teamNamed(ctx, args)
		if err != nil {
			return err
		}
		members, err := p.Members(ctx, t.ID)
		if err != nil {
			return err
		}
		if out.format == "json" {
			return a.json(members)
		}
		rows := [][]string{{"ID", "E-MAIL", "ROLE", "SINCE"}}
		for _, m := range members {
			rows = append(rows, []string{m.ID, m.Email, m.Role, m.JoinedAt.Local().Format(time.DateTime)})
		}
		return a.table(rows)
	})
}

// memberOf is the id of the member that a word names, by id or e-mail address.
func memberOf(ctx context.Context, p *person, team, word string) (string, error) {
	if strings.HasPrefix(word, "usr-") {
		return word, nil
	}
	members, err := p.Members(ctx, team)
	if err != nil {
		return "", err
	}
	for _, m := range members {
		if strings.EqualFold(m.Email, word) {
			return m.ID, nil
		}
	}
	return "", fmt.Errorf("%q is not in the team", word)
}

// teamFlag is --team of what is done to the team's members.
func teamFlag(cmd *cobra.Command, team *string) *cobra.Command {
	cmd.Flags().StringVar(team, "team", "", "team, by id or name (default: the one that you work with)")
	return cmd
}

// named is teamNamed for what --team says.
func (p *person) named(ctx context.Context, flag string) (*client.Team, error) {
	if flag == "" {
		return p.teamNamed(ctx, nil)
	}
	return p.teamNamed(ctx, []string{flag})
}

func (a *app) teamInviteCommand() *cobra.Command {
	var team, role string
	cmd := a.as(&cobra.Command{Use: "invite EMAIL", Short: "Take somebody who has an account into a team", Args: exactly(1)}, nil, func(ctx context.Context, p *person, args []string) error {
		t, err := p.named(ctx, team)
		if err != nil {
			return err
		}
		m, err := p.AddMember(ctx, t.ID, args[0], role)
		if err != nil {
			return err
		}
		return a.table([][]string{{m.ID, m.Email, m.Role}})
	})
	cmd.Flags().StringVar(&role, "role", "member", "member, admin or owner")
	return teamFlag(cmd, &team)
}

func (a *app) teamRoleCommand() *cobra.Command {
	var team string
	return teamFlag(a.as(&cobra.Command{Use: "role MEMBER ROLE", Short: "Make a member a member, admin or owner", Args: exactly(2)}, nil, func(ctx context.Context, p *person, args []string) error {
		t, err := p.named(ctx, team)
		if err != nil {
			return err
		}
		user, err := memberOf(ctx, p, t.ID, args[0])
		if err != nil {
			return err
		}
		m, err := p.ChangeMember(ctx, t.ID, user, args[1])
		if err != nil {
			return err
		}
		return a.table([][]string{{m.ID, m.Email, m.Role}})
	}), &team)
}

func (a *app) teamExpelCommand() *cobra.Command {
	var team string
	return teamFlag(a.as(&cobra.Command{Use: "remove MEMBER", Short: "Take somebody out of a team; the keys that they made for it are revoked", Args: exactly(1)}, nil, func(ctx context.Context, p *person, args []string) error {
		t, err := p.named(ctx, team)
		if err != nil {
			return err
		}
		user, err := memberOf(ctx, p, t.ID, args[0])
		if err == nil {
			err = p.RemoveMember(ctx, t.ID, user)
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(a.out, user)
		return err
	}), &team)
}
