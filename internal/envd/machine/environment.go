package machine

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Export replaces the lines of /etc/environment between these, and keeps all others.
const (
	ownBegin = "# The sandbox's environment (wrenn)"
	ownEnd   = "# End of the sandbox's environment"
)

// Export gives the sandbox's variables to processes that the daemon does not start: login
// shells (/etc/profile.d), sudo, and programs that read /etc/environment, such as cron.
// Login shells keep variables that are set, except PATH, which /etc/profile overwrites.
// Export does nothing in an image without a shell.
func (m *Machine) Export(envs map[string]string) error {
	hook := filepath.Join("profile.d", "zz-wrenn.sh")
	if len(envs) == 0 {
		if _, err := os.Lstat(filepath.Join(m.etc, hook)); errors.Is(err, fs.ErrNotExist) {
			return nil // no environment was ever exported
		}
	}
	if _, err := os.Stat(filepath.Join(m.etc, "../bin/sh")); err != nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Join(m.etc, "profile.d"), 0o755); err != nil {
		return fmt.Errorf("export the environment: %w", err)
	}
	all := func(text string) func([]byte) []byte { return func([]byte) []byte { return []byte(text) } }
	err := errors.Join(
		m.replace(hook, 0o644, all(profile(envs))),
		m.replace("environment", 0o644, func(old []byte) []byte { return environment(old, envs) }),
	)
	if _, e := os.Lstat(filepath.Join(m.etc, "profile")); errors.Is(e, fs.ErrNotExist) {
		err = errors.Join(err, m.replace("profile", 0o644, all("for f in /etc/profile.d/*.sh; do [ ! -r \"$f\" ] || . \"$f\"; done\nunset f\n")))
	}
	// sudo skips files with a dot when it reads this folder's rules. The folder may be there
	// before sudo is installed.
	if e := os.MkdirAll(filepath.Join(m.etc, "sudoers.d"), 0o755); e != nil {
		return errors.Join(err, fmt.Errorf("export the environment: %w", e))
	}
	return errors.Join(err,
		m.replace(filepath.Join("sudoers.d", "zz-wrenn.env"), 0o440, all(sudoEnvironment(envs))),
		m.replace(filepath.Join("sudoers.d", "zz-wrenn"), 0o440, all(sudoers(envs))),
	)
}

// profile returns a POSIX shell script that exports envs. It leaves out variables whose
// names are not valid in a shell. It leaves a PATH alone that has all of its own in it,
// because some images run it in every interactive shell.
func profile(envs map[string]string) string {
	var b strings.Builder
	b.WriteString("# Written by wrenn: the sandbox's environment.\n")
	for _, k := range slices.Sorted(maps.Keys(envs)) {
		if !shellName(k) {
			continue
		}
		value := strings.ReplaceAll(envs[k], "'", `'\''`)
		set := "export " + k + "='" + value + "'"
		if k == "PATH" {
			set = `case ":$PATH:" in *':` + value + `:'*) ;; *) ` + set + " ;; esac"
		} else {
			set = `[ -n "${` + k + `+x}" ] || ` + set
		}
		b.WriteString(set + "\n")
	}
	return b.String()
}

func shellName(s string) bool {
	for i, c := range []byte(s) {
		if c != '_' && (c|0x20 < 'a' || c|0x20 > 'z') && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return s != ""
}

// line returns an assignment in the format that pam_env and sudo read. Both remove the
// outer quotes and nothing else. ok is false if the format cannot express it: # begins a
// comment even in quotes, and nothing stands for a line break.
func line(name, value string) (text string, ok bool) {
	if !shellName(name) || strings.ContainsAny(value, "\n#") {
		return "", false
	}
	if strings.ContainsAny(value, " \t\r\"'\\$`&;|<>()*?[]~!{}") {
		value = `"` + value + `"`
	}
	return name + "=" + value + "\n", true
}

// sudoers returns rules that let sudo use the sandbox's PATH and pass its variables to
// commands. sudo keeps the caller's values of those that its env_file cannot express.
func sudoers(envs map[string]string) string {
	text := `# Written by wrenn: the sandbox's environment reaches commands of sudo.
Defaults !secure_path
Defaults env_file=/etc/sudoers.d/zz-wrenn.env
`
	var kept []string
	for _, k := range slices.Sorted(maps.Keys(envs)) {
		if _, ok := line(k, envs[k]); !ok && shellName(k) {
			kept = append(kept, k)
		}
	}
	if len(kept) > 0 {
		text += `Defaults env_keep += "` + strings.Join(kept, " ") + "\"\n"
	}
	return text
}

// sudoEnvironment returns envs as sudo's env_file.
func sudoEnvironment(envs map[string]string) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(envs)) {
		text, _ := line(k, envs[k])
		b.WriteString(text)
	}
	return b.String()
}

const (
	// pam_env stops reading at a line with more bytes than this. Those before 1.4 stop at
	// lines that are longer than shortLine.
	maxLine, shortLine = 8191, 1023
)

// identity are the variables that every login sets for its own user.
var identity = []string{"HOME", "LOGNAME", "SHELL", "USER"}

// environment returns the text of /etc/environment, which pam_env reads, with envs in it.
// It leaves out what the format cannot express, lines that are too long, and the variables
// in identity, because pam_env overwrites the login's own.
func environment(old []byte, envs map[string]string) []byte {
	var b bytes.Buffer
	own := false
	for line := range bytes.Lines(old) {
		text := string(bytes.TrimRight(line, "\n"))
		switch {
		case text == ownBegin:
			own = true
		case text == ownEnd && own:
			own = false
		case !own:
			b.WriteString(text + "\n")
		}
	}
	if len(envs) == 0 {
		return b.Bytes()
	}
	var lines []string
	for _, k := range slices.Sorted(maps.Keys(envs)) {
		if text, ok := line(k, envs[k]); ok && len(text) <= maxLine && !slices.Contains(identity, k) {
			lines = append(lines, text)
		}
	}
	slices.SortStableFunc(lines, func(a, b string) int { return max(len(a), shortLine) - max(len(b), shortLine) })
	b.WriteString(ownBegin + "\n" + strings.Join(lines, "") + ownEnd + "\n")
	return b.Bytes()
}
