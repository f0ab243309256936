package rest

import (
	"errors"
	"net/http"
	"net/url"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"
	"golang.org/x/oauth2"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/github"
	"github.com/wrenn-dev/wrenn/internal/server/users"
)

// Cookies of a browser's session.
const (
	accessCookie  = "access"
	refreshCookie = "refresh"
	// githubCookie holds the state of a login with GitHub.
	githubCookie = "github"
	githubLasts  = 10 * time.Minute
)

func (a *API) secure() bool { return a.public.Scheme == "https" }

// cookieName returns a cookie's name. Over HTTPS, the name makes browsers bind the cookie
// to this host, because sandboxes' names may be below it.
func (a *API) cookieName(name string) string { return auth.Cookie(name, a.secure()) }

// setCookie sets a cookie that scripts cannot read. An expiry in the past deletes it.
func (a *API) setCookie(w http.ResponseWriter, name, value string, expires time.Time, site http.SameSite) {
	if a.secure() {
		// Remove the cookie from before the service had HTTPS.
		http.SetCookie(w, &http.Cookie{Name: auth.Cookie(name, false), Path: "/", MaxAge: -1, HttpOnly: true, Secure: true, SameSite: site})
	}
	c := &http.Cookie{Name: a.cookieName(name), Value: value, Path: "/", Expires: expires, HttpOnly: true, Secure: a.secure(), SameSite: site}
	if c.MaxAge = int(time.Until(expires).Seconds()); c.MaxAge <= 0 {
		c.MaxAge = -1
	}
	http.SetCookie(w, c)
}

// setSession sets the cookies with a session's tokens.
func (a *API) setSession(w http.ResponseWriter, g auth.Grant) {
	a.setCookie(w, accessCookie, g.Access, g.AccessExpires, http.SameSiteStrictMode)
	a.setCookie(w, refreshCookie, g.Refresh, g.RefreshExpires, http.SameSiteStrictMode)
}

func (a *API) dropSession(w http.ResponseWriter) {
	a.setCookie(w, accessCookie, "", time.Unix(1, 0), http.SameSiteStrictMode)
	a.setCookie(w, refreshCookie, "", time.Unix(1, 0), http.SameSiteStrictMode)
}

// login responds with a session. The tokens are in the body if the client asks for them,
// and in cookies otherwise.
func (a *API) login(w http.ResponseWriter, r *http.Request, status int, g auth.Grant, user db.User, tokens bool) {
	provedToBe(r, user.ID)
	l := rest.Login{User: account(user), AccessExpiresAt: g.AccessExpires.UTC()}
	if tokens {
		l.AccessToken, l.RefreshToken = &g.Access, &g.Refresh
	} else {
		a.setSession(w, g)
	}
	answer(w, status, l)
}

// provedToBe records, for the audit log, the user of an operation without authentication.
func provedToBe(r *http.Request, user uuid.UUID) {
	if o := observed(r); o != nil && user != uuid.Nil {
		o.who.User = user
	}
}

func account(u db.User) rest.Account {
	return rest.Account{ID: id.Format(id.User, u.ID), Email: u.Email}
}

// origin returns the origin of a request for the user's list of sessions.
func (a *API) origin(r *http.Request) users.Origin {
	o := users.Origin{Agent: r.UserAgent()}
	if from := a.clientAddress(r); from.IsValid() {
		o.Address = from.String()
	}
	return o
}

// GetAuthMethods answers GET /v1/auth/methods.
func (a *API) GetAuthMethods(w http.ResponseWriter, r *http.Request) {
	open, err := a.Users.SignUpOpen(r.Context())
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, rest.AuthMethods{SignupOpen: open, Github: a.GitHub != nil})
}

// SignUp answers POST /v1/auth/signup.
func (a *API) SignUp(w http.ResponseWriter, r *http.Request) {
	var req rest.SignUp
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	g, user, err := a.Users.SignUp(r.Context(), req.Email, req.Password, or(req.Token, ""), a.origin(r))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	if g == nil {
		w.WriteHeader(http.StatusAccepted)
		return
	}
	a.login(w, r, http.StatusCreated, *g, user, or(req.Tokens, false))
}

// VerifyEmail answers POST /v1/auth/verify.
func (a *API) VerifyEmail(w http.ResponseWriter, r *http.Request) {
	var req rest.VerifyEmail
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	g, user, err := a.Users.Verify(r.Context(), req.Token, req.Password, a.origin(r))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	a.login(w, r, http.StatusOK, g, user, or(req.Tokens, false))
}

// LogIn answers POST /v1/auth/login.
func (a *API) LogIn(w http.ResponseWriter, r *http.Request) {
	var req rest.LogIn
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	g, user, err := a.Users.LogIn(r.Context(), req.Email, req.Password, a.origin(r))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	a.login(w, r, http.StatusOK, g, user, or(req.Tokens, false))
}

// shownRefresh returns a request's refresh token and whether it was in the body.
func (a *API) shownRefresh(r *http.Request) (token string, inBody bool, err error) {
	var req rest.Refresh
	if err := decode(r, &req); err != nil {
		return "", false, err
	}
	if req.RefreshToken != nil {
		return *req.RefreshToken, true, nil
	}
	if c, err := r.Cookie(a.cookieName(refreshCookie)); err == nil {
		return c.Value, false, nil
	}
	return "", false, nil
}

// Refresh answers POST /v1/auth/refresh.
func (a *API) Refresh(w http.ResponseWriter, r *http.Request) {
	token, inBody, err := a.shownRefresh(r)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	g, err := a.Sessions.Refresh(r.Context(), token)
	if err != nil {
		if !inBody && fault.Is(err, fault.Unauthenticated) {
			a.dropSession(w)
		}
		a.Fail(w, r, err)
		return
	}
	user, err := a.Users.Get(r.Context(), g.User)
	if err != nil {
		// The token was exchanged, so the browser needs the new one.
		if !inBody {
			a.setSession(w, g)
		}
		a.Fail(w, r, err)
		return
	}
	a.login(w, r, http.StatusOK, g, user.User, inBody)
}

// LogOut answers POST /v1/auth/logout.
func (a *API) LogOut(w http.ResponseWriter, r *http.Request) {
	refresh, _, err := a.shownRefresh(r)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	for _, token := range []string{refresh, a.accessToken(r)} {
		if token == "" {
			continue
		}
		user, err := a.Sessions.End(r.Context(), token)
		if err != nil {
			a.Fail(w, r, err)
			return
		}
		provedToBe(r, user)
	}
	a.dropSession(w)
	w.WriteHeader(http.StatusNoContent)
}

// LogOutAll answers POST /v1/auth/logout-all.
func (a *API) LogOutAll(w http.ResponseWriter, r *http.Request) {
	if err := a.Sessions.EndAll(r.Context(), caller(r).User, uuid.Nil); err != nil {
		a.Fail(w, r, err)
		return
	}
	a.dropSession(w)
	w.WriteHeader(http.StatusNoContent)
}

// ChangePassword answers POST /v1/auth/password.
func (a *API) ChangePassword(w http.ResponseWriter, r *http.Request) {
	var req rest.ChangePassword
	err := decode(r, &req)
	if err == nil {
		err = a.Users.ChangePassword(r.Context(), caller(r), req.CurrentPassword, req.NewPassword)
	}
	a.done(w, r, err)
}

// done responds to an operation without a result.
func (a *API) done(w http.ResponseWriter, r *http.Request, err error) {
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// ForgotPassword answers POST /v1/auth/password/forgot.
func (a *API) ForgotPassword(w http.ResponseWriter, r *http.Request) {
	var req rest.ForgotPassword
	err := decode(r, &req)
	if err == nil {
		err = a.Users.ForgotPassword(r.Context(), req.Email)
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusAccepted)
}

// ResetPassword answers POST /v1/auth/password/reset.
func (a *API) ResetPassword(w http.ResponseWriter, r *http.Request) {
	var req rest.ResetPassword
	err := decode(r, &req)
	if err == nil {
		var user uuid.UUID
		user, err = a.Users.ResetPassword(r.Context(), req.Token, req.Password)
		provedToBe(r, user)
	}
	a.done(w, r, err)
}

// githubLogin is the signed state of a login with GitHub.
type githubLogin struct {
	jwt.RegisteredClaims
	State    string `json:"state"`
	Verifier string `json:"verifier"`
	// Link is the user to link the identity to; empty: log in.
	Link string `json:"link,omitempty"`
}

// StartGitHub answers GET /v1/auth/github.
func (a *API) StartGitHub(w http.ResponseWriter, r *http.Request, params rest.StartGitHubParams) {
	if a.GitHub == nil {
		a.Fail(w, r, fault.New(fault.NotFound, "login with GitHub is not configured"))
		return
	}
	begun := githubLogin{State: oauth2.GenerateVerifier(), Verifier: oauth2.GenerateVerifier()}
	if or(params.Link, false) {
		who, err := a.Sessions.Check(r.Context(), a.accessToken(r), nil)
		if err != nil {
			a.Fail(w, r, err)
			return
		}
		begun.Link = who.User.String()
	}
	expires := time.Now().Add(githubLasts)
	begun.ExpiresAt = jwt.NewNumericDate(expires)
	signed, err := jwt.NewWithClaims(jwt.SigningMethodHS256, begun).SignedString(a.GitHubKey)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	// Lax, because the browser comes back from another site.
	a.setCookie(w, githubCookie, signed, expires, http.SameSiteLaxMode)
	w.Header().Set("Cache-Control", "no-store")
	goTo(w, a.GitHub.AuthorizeURL(begun.State, begun.Verifier))
}

// goTo redirects a browser, without a body.
func goTo(w http.ResponseWriter, to string) {
	w.Header().Set("Location", to)
	w.WriteHeader(http.StatusFound)
}

// FinishGitHub answers GET /v1/auth/github/callback.
func (a *API) FinishGitHub(w http.ResponseWriter, r *http.Request, params rest.FinishGitHubParams) {
	if a.GitHub == nil {
		a.Fail(w, r, fault.New(fault.NotFound, "login with GitHub is not configured"))
		return
	}
	err := a.finishGitHub(w, r, params)
	a.setCookie(w, githubCookie, "", time.Unix(1, 0), http.SameSiteLaxMode)
	w.Header().Set("Cache-Control", "no-store")
	to := a.PublicURL + "/"
	if err != nil {
		code := classify(err).Code
		if o := observed(r); o != nil {
			o.code, o.reason = string(code), err
		}
		to += "?login_error=" + url.QueryEscape(string(code))
	}
	goTo(w, to)
}

func (a *API) finishGitHub(w http.ResponseWriter, r *http.Request, params rest.FinishGitHubParams) error {
	stale := fault.New(fault.InvalidArgument, "this login was not started in this browser, or it has expired")
	cookie, err := r.Cookie(a.cookieName(githubCookie))
	if err != nil {
		return stale
	}
	var begun githubLogin
	_, err = jwt.ParseWithClaims(cookie.Value, &begun, func(*jwt.Token) (any, error) { return a.GitHubKey, nil },
		jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Alg()}), jwt.WithExpirationRequired())
	if err != nil || begun.State == "" || !auth.Equal(or(params.State, ""), begun.State) {
		return stale
	}
	if or(params.Code, "") == "" {
		return fault.New(fault.PermissionDenied, "GitHub refused the login: %s", or(params.Error, "no code"))
	}
	who, err := a.GitHub.Identify(r.Context(), *params.Code, begun.Verifier)
	if errors.Is(err, github.ErrNoEmail) {
		return fault.Because(err, fault.PermissionDenied, "%v", err)
	}
	if err != nil {
		return fault.Because(err, fault.BadGateway, "GitHub did not return your identity")
	}
	if begun.Link == "" {
		g, err := a.Users.GitHub(r.Context(), who.Subject, who.Email, a.origin(r))
		if err != nil {
			return err
		}
		provedToBe(r, g.User)
		a.setSession(w, g)
		return nil
	}
	// The session's strict cookies are not sent on a redirect from another site. The
	// signed cookie names the user, and no other browser has it.
	user, err := uuid.Parse(begun.Link)
	if err != nil {
		return stale
	}
	provedToBe(r, user)
	return a.Users.Link(r.Context(), user, who.Subject)
}

// GetMe answers GET /v1/me.
func (a *API) GetMe(w http.ResponseWriter, r *http.Request) {
	user, err := a.Users.Get(r.Context(), caller(r).User)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	teams, err := a.Teams.Of(r.Context(), user.ID)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	me := rest.Me{ID: id.Format(id.User, user.ID), Email: user.Email, Admin: user.Admin, HasPassword: user.PasswordHash != nil, Github: user.GitHub, Teams: make([]rest.Team, len(teams))}
	for i, t := range teams {
		me.Teams[i] = team(t.Team, t.Role)
	}
	answer(w, http.StatusOK, me)
}

// FindUsers answers GET /v1/users.
func (a *API) FindUsers(w http.ResponseWriter, r *http.Request, params rest.FindUsersParams) {
	rows, err := a.Users.Find(r.Context(), caller(r), params.Email)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	list := rest.UserList{Users: make([]rest.Account, len(rows))}
	for i, u := range rows {
		list.Users[i] = account(u)
	}
	answer(w, http.StatusOK, list)
}
