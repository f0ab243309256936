package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

func (a *app) teamCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "team", Short: "Manage teams and members",
		Long: "Manage teams and members. Use `wrenn login` first, or be root where `wrenn up` runs. TEAM is a team's id or name (default: the team that you work with).",
	}
	cmd.AddCommand(a.teamListCommand(), a.teamCreateCommand(), a.teamSwitchCommand(), a.teamRenameCommand(), a.teamRemoveCommand(), a.teamLeaveCommand(),
		a.teamMembersCommand(), a.teamInviteCommand(), a.teamRoleCommand(), a.teamExpelCommand())
	return cmd
}

// teamOf returns the caller's team that word names, by id or by name ("": the first).
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
		return nil, fmt.Errorf("%d of your teams are named %q: use an id", len(found), word)
	}
	return &found[0], nil
}

// teamNamed returns the team that the first argument names, or else the current one.
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
	return a.as(&cobra.Command{Use: "create NAME", Short: "Create a team, with you as its owner", Args: exactly(1)}, &out, func(ctx context.Context, p *person, args []string) error {
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
		Long: "Work with another team from now on: create an API key of that team, and revoke the one that `wrenn login` created.",
	}, nil, func(ctx context.Context, p *person, args []string) error {
		if p.login == nil {
			return fmt.Errorf("the credentials of this machine's `wrenn up` are for one team: use `wrenn login` first")
		}
		if err := p.login.use(ctx, args[0]); err != nil {
			return err
		}
		_, err := fmt.Fprintln(a.out, clean(p.login.Team))
		return err
	})
}

func (a *app) teamRenameCommand() *cobra.Command {
	return a.as(&cobra.Command{Use: "rename TEAM NAME", Short: "Rename a team", Args: exactly(2)}, nil, func(ctx context.Context, p *person, args []string) error {
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
	return a.as(&cobra.Command{Use: "leave TEAM", Short: "Leave a team, and revoke the keys that you created for it", Args: exactly(1)}, nil, func(ctx context.Context, p *person, args []string) error {
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
	return a.as(&cobra.Command{Use: "members [TEAM]", Short: "List the members of a team", Args: noMore(1)}, &out, func(ctx context.Context, p *person, args []string) error {
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

// memberOf returns the id of the member that word names, by id or e-mail address.
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

// teamFlag adds --team to a command that changes members.
func teamFlag(cmd *cobra.Command, team *string) *cobra.Command {
	cmd.Flags().StringVar(team, "team", "", "team, by id or name (default: the one that you work with)")
	return cmd
}

// named returns the team that --team names, or else the current one.
func (p *person) named(ctx context.Context, flag string) (*client.Team, error) {
	if flag == "" {
		return p.teamNamed(ctx, nil)
	}
	return p.teamNamed(ctx, []string{flag})
}

func (a *app) teamInviteCommand() *cobra.Command {
	var team, role string
	cmd := a.as(&cobra.Command{Use: "invite EMAIL", Short: "Add a user who has an account to a team", Args: exactly(1)}, nil, func(ctx context.Context, p *person, args []string) error {
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
	return teamFlag(a.as(&cobra.Command{Use: "role MEMBER ROLE", Short: "Change a member's role: member, admin or owner", Args: exactly(2)}, nil, func(ctx context.Context, p *person, args []string) error {
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
	return teamFlag(a.as(&cobra.Command{Use: "remove MEMBER", Short: "Remove a member from a team, and revoke the keys that they created for it", Args: exactly(1)}, nil, func(ctx context.Context, p *person, args []string) error {
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
