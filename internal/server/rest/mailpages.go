package rest

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
)

var (
	//go:embed mailpage.html
	mailPageHTML string
	//go:embed mailpage.js
	mailPageScript string
)

// mailPages has the pages that links in mails open. Each takes the token from its URL's
// fragment, asks for a password or a click, and sends both to the API. Mail scanners open
// links, but do not click.
type mailPages struct {
	verify, reset, confirm []byte
	// policy is the pages' Content-Security-Policy. It allows only the script and calls
	// of the API.
	policy string
}

// pageContent is the content of a page.
type pageContent struct {
	Title, Says, Done string
	// Label is the label of the password field; empty: no field.
	Label string
	// Action is the form's URL, relative to the page.
	Action, Autocomplete string
	// Again asks for the password twice.
	Again  bool
	URL    string
	Script template.JS
}

func renderMailPages(publicURL string) (mailPages, error) {
	page, err := template.New("mailpage").Parse(mailPageHTML)
	if err != nil {
		return mailPages{}, err
	}
	render := func(c pageContent) ([]byte, error) {
		c.URL, c.Script = publicURL, template.JS(mailPageScript)
		var out bytes.Buffer
		err := page.Execute(&out, c)
		return out.Bytes(), err
	}
	sum := sha256.Sum256([]byte(mailPageScript))
	p := mailPages{policy: fmt.Sprintf("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-%s'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'", base64.StdEncoding.EncodeToString(sum[:]))}
	p.verify, err = render(pageContent{
		Title: "Open your account", Says: "Type the password that you signed up with.", Label: "Password",
		Done: "Your account is open", Action: "v1/auth/verify", Autocomplete: "current-password",
	})
	if err != nil {
		return mailPages{}, err
	}
	p.reset, err = render(pageContent{
		Title: "Set a new password", Says: "You will be logged out everywhere.", Label: "New password",
		Done: "The new password is set", Action: "v1/auth/password/reset", Autocomplete: "new-password", Again: true,
	})
	if err != nil {
		return mailPages{}, err
	}
	p.confirm, err = render(pageContent{
		Title: "Get notifications", Says: "A team wants to send its notifications to your address.",
		Done: "You will get the team's notifications", Action: "v1/channel-confirmations",
	})
	return p, err
}

func (p mailPages) serve(w http.ResponseWriter, page []byte) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", p.policy)
	_, _ = w.Write(page)
}

// GetVerifyPage answers GET /verify.
func (a *API) GetVerifyPage(w http.ResponseWriter, _ *http.Request) {
	a.mailPages.serve(w, a.mailPages.verify)
}

// GetResetPage answers GET /reset-password.
func (a *API) GetResetPage(w http.ResponseWriter, _ *http.Request) {
	a.mailPages.serve(w, a.mailPages.reset)
}

// GetConfirmPage answers GET /confirm-channel.
func (a *API) GetConfirmPage(w http.ResponseWriter, _ *http.Request) {
	a.mailPages.serve(w, a.mailPages.confirm)
}
