package e2e

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// message waits for a mail to an address in the server's log, which has the mails if
// no mail server is configured, and returns its link to a page.
func (i *installation) message(t *testing.T, to, page string) (link string) {
	t.Helper()
	logs := filepath.Join(i.dir, "logs")
	links := regexp.MustCompile(`http[^\s"\\]*/` + page + `#token=[A-Za-z0-9_-]+`)
	within(t, 2*time.Minute, "a mail to "+to+" is in "+logs, func() bool {
		files, err := filepath.Glob(filepath.Join(logs, "*server*"))
		if err != nil || len(files) == 0 {
			t.Fatalf("logs: %v, %v", files, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(b)) {
				if strings.Contains(line, to) && links.MatchString(line) {
					link = links.FindString(line)
				}
			}
		}
		return link != ""
	})
	return link
}

// browse runs a file of browser tests.
func (i *installation) browse(t *testing.T, file string, env ...string) {
	t.Helper()
	if _, err := exec.LookPath("chromium"); err != nil {
		t.Skip("needs chromium")
	}
	if _, err := os.Stat("browser/node_modules/.bin/playwright"); err != nil {
		t.Skip("needs Playwright: npm ci --prefix test/browser")
	}
	cmd := exec.CommandContext(t.Context(), "node_modules/.bin/playwright", "test", file)
	cmd.Dir = "browser"
	cmd.Env = append(os.Environ(), append(env, "WRENN_URL="+i.creds.URL, "WRENN_BROWSER_OUT="+filepath.Join(t.ArtifactDir(), file))...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("playwright: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// TestMailedLinks signs a user up who then forgets the password, and opens the links of both
// mails, which are in the server's log, in a browser.
func TestMailedLinks(t *testing.T) {
	i := up(t)
	call := func(method, path, body string, header http.Header, want int) {
		t.Helper()
		if header == nil {
			header = http.Header{}
		}
		header.Set("Content-Type", "application/json")
		if resp := i.request(t, method, i.listen, path, header, strings.NewReader(body)); resp.StatusCode != want {
			t.Fatalf("%s %s: %s", method, path, resp.Status)
		}
	}
	const email, password = "ada@example.com", "correct horse battery"
	account := `{"email":"` + email + `","password":"` + password + `"}`
	s, err := i.client(t).LogIn(t.Context(), i.creds.Email, i.creds.Password)
	if err != nil {
		t.Fatal(err)
	}
	settings := func(open string) {
		t.Helper()
		call(http.MethodPut, "/v1/admin/settings", `{"signup_open":`+open+`,"default_quota":{}}`, http.Header{"Authorization": {"Bearer " + s.AccessToken}}, http.StatusOK)
	}
	settings("true")
	defer settings("false")
	call(http.MethodPost, "/v1/auth/signup", account, nil, http.StatusAccepted)
	i.browse(t, "verify.spec.js", "WRENN_LINK="+i.message(t, email, "verify"), "WRENN_PASSWORD="+password)
	call(http.MethodPost, "/v1/auth/password/forgot", `{"email":"`+email+`"}`, nil, http.StatusAccepted)
	i.browse(t, "reset.spec.js", "WRENN_LINK="+i.message(t, email, "reset-password"), "WRENN_PASSWORD=new "+password)
	if _, err := i.client(t).LogIn(t.Context(), email, "new "+password); err != nil {
		t.Errorf("log in with the new password: %v", err)
	}
	call(http.MethodPost, "/v1/auth/login", account, nil, http.StatusUnauthorized)
}
