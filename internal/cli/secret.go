package cli

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"regexp"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
)

// secretKey matches the ring of keys in a server's environment file and in the
// secrets.json of `wrenn up`.
var secretKey = regexp.MustCompile(`(?m)(^\s*WRENN_SECRET_KEY=["']?|"secret_key":\s*")([0-9a-fA-F, ]+)`)

func (a *app) keyRotateSecretCommand() *cobra.Command {
	var file string
	var finish bool
	cmd := &cobra.Command{
		Use: "rotate-secret", Short: "Replace WRENN_SECRET_KEY without losing anything", Args: exactly(0),
		Long: `Put a new key before those of WRENN_SECRET_KEY in a file. Nothing is lost: the
database has the installation's secret in encrypted form, and the next server that
starts encrypts it under the new key. Give every server the same file and restart
it. Then run this with --finish, which removes the old keys, and restart the servers
again. Keep the old key as long as backups of the database that were made with it.`,
		RunE: func(*cobra.Command, []string) error {
			id, err := rotateSecret(file, finish)
			if err != nil {
				return err
			}
			said := "the new key is %s: restart every server, then run this again with --finish\n"
			if finish {
				said = "the only key is %s: restart every server\n"
			}
			_, err = fmt.Fprintf(a.out, said, id)
			return err
		},
	}
	cmd.Flags().StringVar(&file, "file", "/etc/wrenn/server.env", "file with WRENN_SECRET_KEY=…, or secrets.json in the data directory of `wrenn up`")
	cmd.Flags().BoolVar(&finish, "finish", false, "remove all keys except the new one, after every server was restarted with both")
	return cmd
}

// rotateSecret puts a new key before the others in a file, or with finish removes all
// except the first. It returns the id of the first key.
func rotateSecret(file string, finish bool) (key string, err error) {
	info, err := os.Stat(file)
	if err != nil {
		return "", err
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	m := secretKey.FindSubmatchIndex(content)
	if m == nil || secretKey.FindIndex(content[m[1]:]) != nil {
		return "", fmt.Errorf("%s must have exactly one line with WRENN_SECRET_KEY", file)
	}
	ring := bytes.TrimSpace(content[m[4]:m[5]])
	first, _, several := bytes.Cut(ring, []byte(","))
	if finish {
		if !several {
			return "", errors.New("there is only one key: run this without --finish first")
		}
		ring = first
	} else {
		if several {
			return "", errors.New("a rotation is under way: finish it first, with --finish")
		}
		var b [32]byte
		_, _ = rand.Read(b[:]) // never fails
		ring = append([]byte(hex.EncodeToString(b[:])+","), ring...)
	}
	out := append(append(append([]byte(nil), content[:m[4]]...), ring...), content[m[5]:]...)
	if err := atomicfile.Write(file, out, info.Mode().Perm()); err != nil {
		return "", err
	}
	return string(ring[:8]) + "…", nil
}
