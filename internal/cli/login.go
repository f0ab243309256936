package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/flock"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// login is what `wrenn login` stores in the user's configuration. Most commands use the
// API key. Commands for teams and keys use the session, because API keys may not.
type login struct {
	URL     string         `json:"url"`
	Email   string         `json:"email"`
	Team    string         `json:"team_id"`
	APIKey  string         `json:"api_key"`
	KeyID   string         `json:"key_id"`
	Session client.Session `json:"session"`
}

// loginFile returns the path of the file with the login.
func loginFile() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("find the user's configuration: %w", err)
	}
	return filepath.Join(dir, "wrenn", "login.json"), nil
}

// readLogin returns the stored login, or nil if there is none.
func readLogin() (*login, error) {
	file, err := loginFile()
	if err != nil {
		return nil, nil //nolint:nilerr // Who has no home is not logged in.
	}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var l login
	if err := json.Unmarshal(b, &l); err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	return &l, nil
}

// write stores the login in a file that only its user may read.
func (l *login) write() error {
	file, err := loginFile()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	if err := atomicfile.WriteJSON(file, l); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}

// lockLogin keeps other commands from refreshing the session at the same time:
// a refresh token is good for one use.
func lockLogin(ctx context.Context) (unlock func(), err error) {
	file, err := loginFile()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return nil, err
	}
	f, err := flock.Lock(ctx, file+".lock")
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

// person is the logged-in user for whom a command that manages teams or keys acts.
type person struct {
	*client.Client
	// url is the service's URL, and team the team that they act for.
	url, team string
	// login is the stored login, whose file is locked (nil: the session is only for this
	// command).
	login *login
	end   func()
}

// refreshBefore is how long an access token must still be valid; otherwise a command
// refreshes it first.
const refreshBefore = time.Minute

// person returns a session: that of `wrenn login`, or else a new one of the admin whose
// address and password `wrenn up` wrote on this machine. Call end afterwards.
func (a *app) person(ctx context.Context) (*person, error) {
	if a.key != "" || os.Getenv("WRENN_API_KEY") != "" {
		return nil, errors.New("API keys cannot manage users, teams or keys: use `wrenn login`, without --api-key and WRENN_API_KEY")
	}
	if a.here() {
		return a.machineAdmin(ctx)
	}
	unlock, err := lockLogin(ctx)
	if err != nil {
		return nil, err
	}
	l, err := readLogin()
	if err != nil || l == nil {
		unlock()
		if err != nil {
			return nil, err
		}
		return a.machineAdmin(ctx)
	}
	if at := first(a.url, os.Getenv("WRENN_URL")); at != "" && !sameService(at, l.URL) {
		unlock()
		return nil, fmt.Errorf("you are logged in to %s, not to %s", l.URL, at)
	}
	c, err := client.New(l.URL, "", client.WithUserAgent(agent))
	if err != nil {
		unlock()
		return nil, err
	}
	if time.Until(l.Session.AccessExpiresAt) < refreshBefore {
		s, err := c.Refresh(ctx, l.Session.RefreshToken)
		if err == nil {
			l.Session = *s
			err = l.write()
		}
		if err != nil {
			unlock()
			return nil, fmt.Errorf("%w; log in again with `wrenn login`", err)
		}
	}
	if c, err = client.New(l.URL, "", client.WithUserAgent(agent), client.WithSession(l.Session.AccessToken), client.WithTeam(l.Team)); err != nil {
		unlock()
		return nil, err
	}
	return &person{Client: c, url: l.URL, team: l.Team, login: l, end: unlock}, nil
}

// machineAdmin logs in as the admin of this machine's `wrenn up`, for one command.
func (a *app) machineAdmin(ctx context.Context) (*person, error) {
	have, err := a.credentials()
	if err != nil {
		return nil, err
	}
	at := first(a.url, os.Getenv("WRENN_URL"), have.URL)
	if !sameService(at, have.URL) {
		return nil, fmt.Errorf("the admin's password on this machine is for %s, not for %s; use `wrenn login`", have.URL, at)
	}
	c, err := client.New(at, "", client.WithUserAgent(agent))
	if err != nil {
		return nil, err
	}
	s, err := c.LogIn(ctx, have.Email, have.Password)
	if err != nil {
		return nil, fmt.Errorf("%w; if the admin's password was changed, use `wrenn login`", err)
	}
	end := func() { _ = c.LogOut(context.WithoutCancel(ctx), s.RefreshToken) }
	as, err := client.New(at, "", client.WithUserAgent(agent), client.WithSession(s.AccessToken))
	if err != nil {
		end()
		return nil, err
	}
	teams, err := as.Teams(ctx)
	if err != nil {
		end()
		return nil, err
	}
	p := &person{Client: as, url: at, end: end}
	if len(teams) > 0 {
		p.team = teams[0].ID
	}
	return p, nil
}

// credentials is the file in which `wrenn up` tells commands on this machine its URL and
// secrets.
type credentials struct {
	URL      string `json:"url"`
	APIKey   string `json:"api_key"`
	Email    string `json:"email"`
	Password string `json:"password"`
}

func (a *app) credentials() (credentials, error) {
	var have credentials
	file := layout.Dir(first(a.dir, os.Getenv("WRENN_DIR"), layout.DefaultDir)).Credentials()
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, os.ErrPermission):
		return have, fmt.Errorf("no permission to read %s: run this as root, use `wrenn login`, or set WRENN_URL and WRENN_API_KEY", file)
	case errors.Is(err, os.ErrNotExist):
		return have, fmt.Errorf("no service is configured: there is no %s; start one with `wrenn up`, use `wrenn login`, or set WRENN_URL and WRENN_API_KEY", file)
	case err != nil:
		return have, err
	}
	if err := json.Unmarshal(b, &have); err != nil {
		return have, fmt.Errorf("read %s: %w", file, err)
	}
	return have, nil
}

// here reports whether the user named the directory of a `wrenn up`, whose credentials
// then go before a login.
func (a *app) here() bool { return a.dir != "" || os.Getenv("WRENN_DIR") != "" }

// ask prompts for a line and reads it, without echo if it is a secret.
func (a *app) ask(what string, secret bool, from *bufio.Reader) (string, error) {
	in, terminal := a.in.(*os.File)
	terminal = terminal && term.IsTerminal(int(in.Fd()))
	if terminal {
		fmt.Fprintf(a.err, "%s: ", what)
	}
	if terminal && secret {
		b, err := term.ReadPassword(int(in.Fd()))
		fmt.Fprintln(a.err)
		return string(b), err
	}
	line, err := from.ReadString('\n')
	line = strings.TrimRight(line, "\r\n")
	if line == "" && err != nil {
		if errors.Is(err, io.EOF) {
			err = usage("standard input has no %s", what)
		}
		return "", err
	}
	return line, nil
}

func (a *app) loginCommand() *cobra.Command {
	var email, team, verify string
	cmd := &cobra.Command{
		Use: "login", Short: "Log in to a service with e-mail address and password", Args: exactly(0),
		Long: `Log in to a service with e-mail address and password.

The command asks for both, or reads them from standard input, one line each. It
creates an API key for your team and stores it with the session in your
configuration (wrenn/login.json), which only you may read. Other commands use this
key by default. ` + "`wrenn logout`" + ` ends the session and revokes the key.

--verify activates the account of a mailed link, or of the token at its end.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			at := first(a.url, os.Getenv("WRENN_URL"))
			if at == "" {
				have, err := a.credentials()
				if err != nil {
					return usage("name the service with --url, as in --url https://wrenn.example.com")
				}
				at = have.URL
			}
			c, err := client.New(at, "", client.WithUserAgent(agent))
			if err != nil {
				return &UsageError{err}
			}
			lines := bufio.NewReader(a.in)
			if email == "" && verify == "" {
				if email, err = a.ask("E-mail address", false, lines); err != nil {
					return err
				}
			}
			password, err := a.ask("Password", true, lines)
			if err != nil {
				return err
			}
			unlock, err := lockLogin(cmd.Context())
			if err != nil {
				return err
			}
			defer unlock()
			var s *client.Session
			if verify != "" {
				if _, token, ok := strings.Cut(verify, "#token="); ok {
					verify = token
				}
				s, err = c.VerifyEmail(cmd.Context(), verify, password)
			} else {
				s, err = c.LogIn(cmd.Context(), email, password)
			}
			if err != nil {
				return err
			}
			before, err := readLogin()
			if err != nil {
				return err
			}
			l := &login{URL: at, Email: s.User.Email, Session: *s}
			if err := l.use(cmd.Context(), team); err != nil {
				_ = c.LogOut(context.WithoutCancel(cmd.Context()), s.RefreshToken)
				return err
			}
			if before != nil {
				before.revoke(cmd.Context())
			}
			fmt.Fprintf(a.out, "%s at %s, team %s\n", clean(l.Email), clean(l.URL), clean(l.Team))
			return nil
		},
	}
	cmd.Flags().StringVar(&email, "email", "", "e-mail address")
	cmd.Flags().StringVar(&team, "team", "", "team to work with, by id or name (default: the first that you joined)")
	cmd.Flags().StringVar(&verify, "verify", "", "link of the mail that activates the account, or the link's token")
	return cmd
}

// keyName returns the name of the API key that a login creates.
func keyName() string {
	host, err := os.Hostname()
	if err != nil {
		return "wrenn login"
	}
	return "wrenn login on " + host
}

// use creates an API key for a team ("" for the first one), stores it, and revokes the
// stored one before it.
func (l *login) use(ctx context.Context, word string) error {
	c, err := client.New(l.URL, "", client.WithUserAgent(agent), client.WithSession(l.Session.AccessToken))
	if err != nil {
		return err
	}
	t, err := teamOf(ctx, c, word)
	if err != nil {
		return err
	}
	c, err = client.New(l.URL, "", client.WithUserAgent(agent), client.WithSession(l.Session.AccessToken), client.WithTeam(t.ID))
	if err != nil {
		return err
	}
	old := *l
	k, err := c.CreateKey(ctx, client.KeyOptions{Name: keyName()})
	if err != nil {
		return err
	}
	l.Team, l.APIKey, l.KeyID = t.ID, k.Key, k.ID
	if err := l.write(); err != nil {
		_ = c.RevokeKey(context.WithoutCancel(ctx), k.ID)
		return err
	}
	if old.KeyID != "" {
		old.revokeKey(ctx)
	}
	return nil
}

func (l *login) revokeKey(ctx context.Context) {
	c, err := client.New(l.URL, "", client.WithUserAgent(agent), client.WithSession(l.Session.AccessToken), client.WithTeam(l.Team))
	if err == nil && l.KeyID != "" {
		_ = c.RevokeKey(ctx, l.KeyID)
	}
}

// revoke revokes a login's API key and ends its session. It ignores errors.
func (l *login) revoke(ctx context.Context) {
	c, err := client.New(l.URL, "", client.WithUserAgent(agent), client.WithRetries(0))
	if err != nil {
		return
	}
	if time.Until(l.Session.AccessExpiresAt) < refreshBefore {
		if s, err := c.Refresh(ctx, l.Session.RefreshToken); err == nil {
			l.Session = *s
		}
	}
	l.revokeKey(ctx)
	_ = c.LogOut(ctx, l.Session.RefreshToken)
}

func (a *app) logoutCommand() *cobra.Command {
	return &cobra.Command{
		Use: "logout", Short: "End the session and revoke the API key of `wrenn login`", Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			unlock, err := lockLogin(cmd.Context())
			if err != nil {
				return err
			}
			defer unlock()
			l, err := readLogin()
			if err != nil || l == nil {
				return err
			}
			file, err := loginFile()
			if err != nil {
				return err
			}
			l.revoke(cmd.Context())
			return os.Remove(file)
		},
	}
}
