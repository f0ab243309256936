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

// sudoers lets sudo use the sandbox's PATH, and pass its variables to commands.
const sudoers = `# Written by wrenn: the sandbox's environment reaches commands of sudo.
Defaults !secure_path
Defaults env_file=/etc/sudoers.d/zz-wrenn.env
`

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
	if _, e := os.Stat(filepath.Join(m.etc, "sudoers.d")); e == nil {
		// sudo skips files with a dot when it reads this folder's rules.
		err = errors.Join(err, m.replace(filepath.Join("sudoers.d", "zz-wrenn.env"), 0o440, all(sudoEnvironment(envs))), m.replace(filepath.Join("sudoers.d", "zz-wrenn"), 0o440, all(sudoers)))
	}
	return err
}

// profile returns a POSIX shell script that exports envs. It leaves out variables whose
// names are not valid in a shell.
func profile(envs map[string]string) string {
	var b strings.Builder
	b.WriteString("# Written by wrenn: the sandbox's environment.\n")
	for _, k := range slices.Sorted(maps.Keys(envs)) {
		if !shellName(k) {
			continue
		}
		set := "export " + k + "='" + strings.ReplaceAll(envs[k], "'", `'\''`) + "'"
		if k != "PATH" {
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

// sudoEnvironment returns envs as sudo's env_file. It leaves out variables with line breaks
// or #, which the format cannot express. sudo removes the outer quotes, and no others.
func sudoEnvironment(envs map[string]string) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(envs)) {
		if shellName(k) && !strings.ContainsAny(envs[k], "\n\r#") {
			fmt.Fprintf(&b, "%s=\"%s\"\n", k, envs[k])
		}
	}
	return b.String()
}

// environment returns the text of /etc/environment with envs in it. It leaves out
// variables with line breaks, #, quotes or backslashes, which the format cannot express.
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
	b.WriteString(ownBegin + "\n")
	for _, k := range slices.Sorted(maps.Keys(envs)) {
		if shellName(k) && !strings.ContainsAny(envs[k], "\n\r#'\"\\") {
			b.WriteString(k + "=" + envs[k] + "\n")
		}
	}
	b.WriteString(ownEnd + "\n")
	return b.Bytes()
}
