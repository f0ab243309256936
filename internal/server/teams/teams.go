// Package teams has the rules of teams: who their members are, who may change that, and
// how a team and everything it owns is deleted.
package teams

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/each"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/page"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

const (
	// most is how many teams a user may be in before they can create another.
	most = 50
	// againAfter is how often interrupted deletions are retried.
	againAfter = 30 * time.Second
	// removeWithin bounds one attempt to delete a team.
	removeWithin = 5 * time.Minute
	// removals is how many objects of a team are deleted at once, teamsAtOnce how many
	// teams.
	removals    = 8
	teamsAtOnce = 8
)

// Config configures a [Service].
type Config struct {
	Store     *store.Store
	Sandboxes *sandboxes.Service
	Templates *templates.Service
	Log       *slog.Logger
}

// Service manages all teams.
type Service struct {
	Config
	// poke makes Run retry deletions soon.
	poke chan struct{}
}

// New returns a service. [Service.Run] finishes interrupted deletions.
func New(c Config) *Service { return &Service{Config: c, poke: make(chan struct{}, 1)} }

func checkName(name string) error {
	if strings.TrimSpace(name) == "" {
		return fault.New(fault.InvalidArgument, "name: must not be blank")
	}
	return nil
}

// wrap adds the operation to internal errors. Faults stay as they are.
func wrap(err error, doing string) error {
	var f *fault.Error
	if err == nil || errors.As(err, &f) {
		return err
	}
	if errors.Is(err, store.ErrNoRows) {
		return fault.New(fault.NotFound, "no such team")
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// Create creates a team with the user as its owner.
func (s *Service) Create(ctx context.Context, user uuid.UUID, name string) (db.Team, error) {
	var row db.Team
	if err := checkName(name); err != nil {
		return row, err
	}
	err := s.Store.InTx(ctx, func(q *db.Queries) error {
		if _, err := q.LockUser(ctx, user); err != nil {
			return err
		}
		if n, err := q.CountUserTeams(ctx, user); err != nil {
			return err
		} else if n >= most {
			return fault.New(fault.QuotaExceeded, "you are already in %d teams", n)
		}
		team := uuid.New()
		if err := q.InsertTeam(ctx, db.InsertTeamParams{ID: team, Name: name}); err != nil {
			return err
		}
		if err := q.InsertTeamMember(ctx, db.InsertTeamMemberParams{TeamID: team, UserID: user, Role: string(auth.Owner)}); err != nil {
			return err
		}
		var err error
		row, err = q.GetTeam(ctx, team)
		return err
	})
	return row, wrap(err, "create team")
}

// Of returns a user's teams in the order in which they joined them.
func (s *Service) Of(ctx context.Context, user uuid.UUID) ([]db.ListUserTeamsRow, error) {
	rows, err := s.Store.ListUserTeams(ctx, user)
	return rows, wrap(err, "list teams")
}

// List returns a page of all teams, oldest first, and the cursor of the next page.
func (s *Service) List(ctx context.Context, cursor string, limit int) ([]db.Team, string, error) {
	at, after, err := page.Oldest(cursor)
	if err != nil {
		return nil, "", err
	}
	rows, err := s.Store.ListTeams(ctx, db.ListTeamsParams{AfterAt: at, AfterID: after, MaxRows: int32(limit) + 1})
	if err != nil {
		return nil, "", fmt.Errorf("list teams: %w", err)
	}
	rows, next := page.Cut(rows, limit, func(t db.Team) string { return page.Time(t.CreatedAt, t.ID) })
	return rows, next, nil
}

// Get returns a team, or fails with not_found.
func (s *Service) Get(ctx context.Context, team uuid.UUID) (db.Team, error) {
	row, err := s.Store.GetTeam(ctx, team)
	return row, wrap(err, "look up team")
}

// Rename renames a team.
func (s *Service) Rename(ctx context.Context, team uuid.UUID, name string) (db.Team, error) {
	if err := checkName(name); err != nil {
		return db.Team{}, err
	}
	row, err := s.Store.RenameTeam(ctx, db.RenameTeamParams{ID: team, Name: name})
	return row, wrap(err, "rename team")
}

// Members returns a team's members, oldest first.
func (s *Service) Members(ctx context.Context, team uuid.UUID) ([]db.ListMembersRow, error) {
	rows, err := s.Store.ListMembers(ctx, team)
	return rows, wrap(err, "list members")
}

// errTakeOver keeps owners from handing a team to somebody who did not ask for it,
// because the team's use would then fill that person's quota.
var errTakeOver = fault.New(fault.Conflict, "the team's use counts towards the quota of its first owner, so only the next owner can take it over, by removing the first or changing their role")

// change runs f under the lock of the caller's team, with the caller's current role,
// which may have changed since the call began.
func (s *Service) change(ctx context.Context, by auth.Principal, least auth.Role, doing string, f func(*db.Queries, auth.Role) error) error {
	err := s.Store.InTx(ctx, func(q *db.Queries) error {
		if err := auth.LockMembers(ctx, q, by.Team); err != nil {
			return err
		}
		me, err := q.GetMember(ctx, db.GetMemberParams{TeamID: by.Team, UserID: by.User})
		if err != nil {
			return err
		}
		role := auth.Role(me.Role)
		if !role.AtLeast(least) {
			return fault.New(fault.PermissionDenied, "your role in the team is %s, but this needs %s", role, least)
		}
		payer, err := q.GetTeamPayer(ctx, by.Team)
		if err != nil {
			return err
		}
		if err := f(q, role); err != nil {
			return err
		}
		now, err := q.GetTeamPayer(ctx, by.Team)
		if err == nil && now != payer && now != by.User {
			err = errTakeOver
		}
		return err
	})
	return wrap(err, doing)
}

var errOwners = fault.New(fault.PermissionDenied, "only owners may add, change and remove owners")

// Add adds the user with an address to the team. Only owners can add owners. It fails
// with not_found if there is no such user, and with conflict if they are already a
// member.
func (s *Service) Add(ctx context.Context, by auth.Principal, email string, role auth.Role) (db.GetMemberRow, error) {
	var row db.GetMemberRow
	err := s.change(ctx, by, auth.Admin, "add member", func(q *db.Queries, mine auth.Role) error {
		if role == auth.Owner && mine != auth.Owner {
			return errOwners
		}
		user, err := q.GetUserByEmail(ctx, email)
		if errors.Is(err, store.ErrNoRows) || err == nil && (!user.Active || user.VerifiedAt == nil) {
			return fault.New(fault.NotFound, "no user has this e-mail address")
		}
		if err != nil {
			return err
		}
		err = q.InsertTeamMember(ctx, db.InsertTeamMemberParams{TeamID: by.Team, UserID: user.ID, Role: string(role)})
		if store.Duplicate(err) {
			return fault.New(fault.Conflict, "the user is already in the team")
		}
		if err != nil {
			return err
		}
		row, err = q.GetMember(ctx, db.GetMemberParams{TeamID: by.Team, UserID: user.ID})
		return err
	})
	return row, err
}

// member returns a member of the team, or fails with not_found.
func member(ctx context.Context, q *db.Queries, team, user uuid.UUID) (db.GetMemberRow, error) {
	row, err := q.GetMember(ctx, db.GetMemberParams{TeamID: team, UserID: user})
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.NotFound, "no such member")
	}
	return row, err
}

// keepOwner fails with conflict if the team has no owner left.
func keepOwner(ctx context.Context, q *db.Queries, team uuid.UUID) error {
	n, err := q.CountOwners(ctx, team)
	if err == nil && n == 0 {
		err = fault.New(fault.Conflict, "the team needs an owner: make somebody else an owner first, or delete the team")
	}
	return err
}

// SetRole changes a member's role.
func (s *Service) SetRole(ctx context.Context, by auth.Principal, user uuid.UUID, role auth.Role) (db.GetMemberRow, error) {
	var row db.GetMemberRow
	err := s.change(ctx, by, auth.Admin, "set member's role", func(q *db.Queries, mine auth.Role) error {
		var err error
		if row, err = member(ctx, q, by.Team, user); err != nil {
			return err
		}
		if mine != auth.Owner && (role == auth.Owner || auth.Role(row.Role) == auth.Owner) {
			return errOwners
		}
		if _, err := q.SetMemberRole(ctx, db.SetMemberRoleParams{TeamID: by.Team, UserID: user, Role: string(role)}); err != nil {
			return err
		}
		row.Role = string(role)
		return keepOwner(ctx, q, by.Team)
	})
	return row, err
}

// Remove removes a member and deletes the API keys that they created for the team,
// because they know them.
func (s *Service) Remove(ctx context.Context, by auth.Principal, user uuid.UUID) error {
	return s.change(ctx, by, auth.Admin, "remove member", func(q *db.Queries, mine auth.Role) error {
		row, err := member(ctx, q, by.Team, user)
		if err != nil {
			return err
		}
		if mine != auth.Owner && auth.Role(row.Role) == auth.Owner {
			return errOwners
		}
		return drop(ctx, q, by.Team, user)
	})
}

// Leave removes the caller from the team and deletes the API keys that they created for
// it.
func (s *Service) Leave(ctx context.Context, by auth.Principal) error {
	return s.change(ctx, by, auth.Member, "leave team", func(q *db.Queries, _ auth.Role) error {
		return drop(ctx, q, by.Team, by.User)
	})
}

func drop(ctx context.Context, q *db.Queries, team, user uuid.UUID) error {
	if _, err := q.DeleteMember(ctx, db.DeleteMemberParams{TeamID: team, UserID: user}); err != nil {
		return err
	}
	if _, err := q.DeleteMakersAPIKeys(ctx, db.DeleteMakersAPIKeysParams{TeamID: team, UserID: &user}); err != nil {
		return err
	}
	return keepOwner(ctx, q, team)
}

// Delete deletes a team. The team disappears at once; then the service deletes its
// objects on all hosts, and then its rows. done reports that nothing is left. Otherwise
// the deletion continues in the background, with retries.
func (s *Service) Delete(ctx context.Context, team uuid.UUID) (done bool, err error) {
	if team == uuid.Nil {
		return false, fault.New(fault.NotFound, "no such team")
	}
	n, err := s.Store.MarkTeamDeleting(ctx, team)
	if err != nil {
		return false, fmt.Errorf("delete team: %w", err)
	}
	if n == 0 {
		return false, fault.New(fault.NotFound, "no such team")
	}
	s.Log.Info("deleting team", "team_id", id.Format(id.Team, team))
	if err := s.remove(ctx, team); err != nil {
		s.Log.Info("deletion of team continues in the background", "team_id", id.Format(id.Team, team), "error", err)
		select {
		case s.poke <- struct{}{}:
		default:
		}
		return false, nil
	}
	return true, nil
}

// remove deletes what is left of a team. Every step is idempotent, and several servers
// may run it at once.
func (s *Service) remove(ctx context.Context, team uuid.UUID) error {
	ctx, cancel := context.WithTimeout(ctx, removeWithin)
	defer cancel()
	live, err := s.Store.ListTeamLiveSandboxes(ctx, team)
	if err != nil {
		return fmt.Errorf("list sandboxes: %w", err)
	}
	err = each.Do(ctx, s.Log, removals, removeWithin, live, func(ctx context.Context, sandbox uuid.UUID) error {
		if err := s.Sandboxes.Delete(ctx, team, sandbox, "the deletion of its team"); err != nil && !fault.Is(err, fault.NotFound) {
			return fmt.Errorf("delete sandbox %s: %w", id.Format(id.Sandbox, sandbox), err)
		}
		return nil
	})
	if err != nil {
		return err // Templates may still be in use.
	}
	owned, err := s.Store.ListTeamTemplates(ctx, team)
	if err != nil {
		return fmt.Errorf("list templates: %w", err)
	}
	err = each.Do(ctx, s.Log, removals, removeWithin, owned, func(ctx context.Context, t db.Template) error {
		if err := s.Templates.DeleteAny(ctx, t.ID); err != nil && !fault.Is(err, fault.NotFound) {
			return fmt.Errorf("delete template %s: %w", id.Format(id.Template, t.ID), err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		if _, err := q.LockDeletingTeam(ctx, team); err != nil {
			return err
		}
		if err := q.DeleteTeamSandboxes(ctx, team); err != nil {
			return err
		}
		// This fails if a sandbox has not ended, as it must.
		n, err := q.DeleteTeam(ctx, team)
		if err == nil && n == 0 {
			err = errors.New("a template was created during the deletion")
		}
		return err
	})
	if errors.Is(err, store.ErrNoRows) {
		return nil // Another server was faster.
	}
	if err != nil {
		return fmt.Errorf("delete rows: %w", err)
	}
	s.Log.Info("team deleted", "team_id", id.Format(id.Team, team))
	return nil
}

// Run retries interrupted deletions until ctx is done. Teams are deleted in parallel, so
// that a slow one does not delay the others.
func (s *Service) Run(ctx context.Context) {
	r := remover{Service: s, removing: make(map[uuid.UUID]bool)}
	defer r.wg.Wait()
	tick := time.NewTicker(againAfter)
	defer tick.Stop()
	for {
		teams, err := s.Store.ListDeletingTeams(ctx)
		if err != nil && ctx.Err() == nil {
			s.Log.Warn("list teams to delete", "error", err)
		}
		for _, team := range teams {
			r.begin(ctx, team)
		}
		select {
		case <-tick.C:
		case <-s.poke:
			// Give the cause of the failure a moment to pass.
			t := time.NewTimer(time.Second)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// remover deletes teams in parallel, each at most once at a time.
type remover struct {
	*Service
	wg sync.WaitGroup

	mu       sync.Mutex
	removing map[uuid.UUID]bool
}

// begin starts the deletion of a team, unless it is running or too many others are. The
// next tick retries.
func (r *remover) begin(ctx context.Context, team uuid.UUID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.removing[team] || len(r.removing) >= teamsAtOnce {
		return
	}
	r.removing[team] = true
	r.wg.Go(func() {
		err := fault.Guard(r.Log, func() error { return r.remove(ctx, team) })
		if err != nil && ctx.Err() == nil {
			r.Log.Warn("delete team", "team_id", id.Format(id.Team, team), "error", err)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.removing, team)
	})
}
