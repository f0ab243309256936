// Package teams holds the rules of teams: who is in them, who may change that,
// and how all that a team owns goes when it goes.
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
	// most is how many teams somebody may be in when they make another.
	most = 50
	// againAfter is how long after a failed removal the next one begins.
	againAfter = 30 * time.Second
	// removeWithin bounds one go at removing a team.
	removeWithin = 5 * time.Minute
	// removals is how many things of a team are removed at once, teamsAtOnce how
	// many teams.
	removals    = 8
	teamsAtOnce = 8
)

// Config is what a Service works with.
type Config struct {
	Store     *store.Store
	Sandboxes *sandboxes.Service
	Templates *templates.Service
	Log       *slog.Logger
}

// Service is all teams.
type Service struct {
	Config
	// poke asks for a look at the teams that are to be removed.
	poke chan struct{}
}

// New returns the teams of a store. Run must run for deletions to be finished.
func New(c Config) *Service { return &Service{Config: c, poke: make(chan struct{}, 1)} }

func checkName(name string) error {
	if strings.TrimSpace(name) == "" {
		return fault.New(fault.InvalidArgument, "name: must not be blank")
	}
	return nil
}

// wrap says what was being done, unless err is for the caller.
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

// Create makes a team that a user owns.
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
			return fault.New(fault.QuotaExceeded, "you are in %d teams already", n)
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
	return row, wrap(err, "make team")
}

// Of returns the teams that a user is in, the one that they joined first first.
func (s *Service) Of(ctx context.Context, user uuid.UUID) ([]db.ListUserTeamsRow, error) {
	rows, err := s.Store.ListUserTeams(ctx, user)
	return rows, wrap(err, "list teams")
}

// List returns a page of all teams, the oldest first, and the next one's cursor.
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

// Rename gives a team another name.
func (s *Service) Rename(ctx context.Context, team uuid.UUID, name string) (db.Team, error) {
	if err := checkName(name); err != nil {
		return db.Team{}, err
	}
	row, err := s.Store.RenameTeam(ctx, db.RenameTeamParams{ID: team, Name: name})
	return row, wrap(err, "rename team")
}

// Members returns a team's members, the oldest first.
func (s *Service) Members(ctx context.Context, team uuid.UUID) ([]db.ListMembersRow, error) {
	rows, err := s.Store.ListMembers(ctx, team)
	return rows, wrap(err, "list members")
}

// errTakeOver keeps an owner from handing a team to somebody who did not ask for it:
// what the team takes would then fill that person's quota.
var errTakeOver = fault.New(fault.Conflict, "what the team has counts for its first owner, so only the next owner can take it over, by removing the first or changing their role")

// change runs f under the lock of the caller's team, with what the caller is
// in it now: what they were when the call began may have changed.
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
			return fault.New(fault.PermissionDenied, "your role in the team is %s, this needs %s", role, least)
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

var errOwners = fault.New(fault.PermissionDenied, "only owners make, change and remove owners")

// Add makes the user with an address a member. Only owners add owners. It
// fails with not_found where there is no such user, with conflict where they
// are in the team.
func (s *Service) Add(ctx context.Context, by auth.Principal, email string, role auth.Role) (db.GetMemberRow, error) {
	var row db.GetMemberRow
	err := s.change(ctx, by, auth.Admin, "add member", func(q *db.Queries, mine auth.Role) error {
		if role == auth.Owner && mine != auth.Owner {
			return errOwners
		}
		user, err := q.GetUserByEmail(ctx, email)
		if errors.Is(err, store.ErrNoRows) || err == nil && (!user.Active || user.VerifiedAt == nil) {
			return fault.New(fault.NotFound, "nobody with this e-mail address has an account")
		}
		if err != nil {
			return err
		}
		err = q.InsertTeamMember(ctx, db.InsertTeamMemberParams{TeamID: by.Team, UserID: user.ID, Role: string(role)})
		if store.Duplicate(err) {
			return fault.New(fault.Conflict, "they are in the team already")
		}
		if err != nil {
			return err
		}
		row, err = q.GetMember(ctx, db.GetMemberParams{TeamID: by.Team, UserID: user.ID})
		return err
	})
	return row, err
}

// member returns what somebody is in the caller's team.
func member(ctx context.Context, q *db.Queries, team, user uuid.UUID) (db.GetMemberRow, error) {
	row, err := q.GetMember(ctx, db.GetMemberParams{TeamID: team, UserID: user})
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.NotFound, "no such member")
	}
	return row, err
}

// spare fails with conflict where a team would be without owners.
func spare(ctx context.Context, q *db.Queries, team uuid.UUID) error {
	n, err := q.CountOwners(ctx, team)
	if err == nil && n == 0 {
		err = fault.New(fault.Conflict, "the last owner stays: make another owner before, or delete the team")
	}
	return err
}

// SetRole changes what a member is.
func (s *Service) SetRole(ctx context.Context, by auth.Principal, user uuid.UUID, role auth.Role) (db.GetMemberRow, error) {
	var row db.GetMemberRow
	err := s.change(ctx, by, auth.Admin, "change member", func(q *db.Queries, mine auth.Role) error {
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
		return spare(ctx, q, by.Team)
	})
	return row, err
}

// Remove takes somebody out of the team, and the API keys with them that they
// made for it: they know them.
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

// Leave takes the caller out of the team, and the API keys that they made.
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
	return spare(ctx, q, team)
}

// Delete removes a team: from that moment nobody sees it, then what it owns
// goes from every host, then the rest. done says that nothing is left; else
// the removal goes on, and again after whatever stopped it is over.
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
	s.Log.Info("team is being deleted", "team_id", id.Format(id.Team, team))
	if err := s.remove(ctx, team); err != nil {
		s.Log.Info("removing a team goes on later", "team_id", id.Format(id.Team, team), "error", err)
		select {
		case s.poke <- struct{}{}:
		default:
		}
		return false, nil
	}
	return true, nil
}

// remove removes what is left of a team that is being deleted. Every step can
// be repeated, and several servers may do it at once.
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
		return err // Templates may be in use still.
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
		// Fails, and for good reason, where a sandbox has not ended.
		n, err := q.DeleteTeam(ctx, team)
		if err == nil && n == 0 {
			err = errors.New("a template was made meanwhile")
		}
		return err
	})
	if errors.Is(err, store.ErrNoRows) {
		return nil // Another server was faster.
	}
	if err != nil {
		return fmt.Errorf("delete rows: %w", err)
	}
	s.Log.Info("team is deleted", "team_id", id.Format(id.Team, team))
	return nil
}

// Run finishes deletions that something stopped, until ctx is done. A team whose
// removal takes long holds up no other: the others go on beside it.
func (s *Service) Run(ctx context.Context) {
	r := remover{Service: s, removing: make(map[uuid.UUID]bool)}
	defer r.wg.Wait()
	tick := time.NewTicker(againAfter)
	defer tick.Stop()
	for {
		teams, err := s.Store.ListDeletingTeams(ctx)
		if err != nil && ctx.Err() == nil {
			s.Log.Warn("list teams that are being deleted", "error", err)
		}
		for _, team := range teams {
			r.begin(ctx, team)
		}
		select {
		case <-tick.C:
		case <-s.poke:
			// What stopped it may take a moment to pass.
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

// remover removes teams side by side, each once at a time.
type remover struct {
	*Service
	wg sync.WaitGroup

	mu       sync.Mutex
	removing map[uuid.UUID]bool
}

// begin begins to remove a team unless that is under way. With as many under
// way as may be, it is left to the next look.
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
			r.Log.Warn("remove team", "team_id", id.Format(id.Team, team), "error", err)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.removing, team)
	})
}
