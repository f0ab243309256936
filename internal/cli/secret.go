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

// secretKey finds the ring of keys in a server's environment file, and in the
// file of secrets of `wrenn up`.
var secretKey = regexp.MustCompile(`(?m)(^\s*WRENN_SECRET_KEY=["']?|"secret_key":\s*")([0-9a-fA-F, ]+)`)

func (a *app) keyRotateSecretCommand() *cobra.Command {
	var file string
	var finish bool
	cmd := &cobra.Command{
		Use: "rotate-secret", Short: "Replace WRENN_SECRET_KEY without losing anything", Args: exactly(0),
		Long: `Put another key before those of WRENN_SECRET_KEY in a file. Nothing that was
made with the old key is lost: the database keeps the installation's secret
encrypted, and the next server that starts encrypts it under the new key. Give
every server the same file and restart it, then run this with --finish, which
takes the old keys away, and restart them again. A backup of the database needs
the key of its time.`,
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
	cmd.Flags().StringVar(&file, "file", "/etc/wrenn/server.env", "file with WRENN_SECRET_KEY=…; of wrenn up: secrets.json in its data directory")
	cmd.Flags().BoolVar(&finish, "finish", false, "take away all keys but the new one, once every server was restarted with both")
	return cmd
}

// rotateSecret puts a new key before the others in a file, or with finish takes
// all but the first away. It returns how the first key begins.
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
		return "", fmt.Errorf("%s has no line, or more than one, with WRENN_SECRET_KEY", file)
	}
	ring := bytes.TrimSpace(content[m[4]:m[5]])
	first, _, several := bytes.Cut(ring, []byte(","))
	if finish {
		if !several {
			return "", errors.New("there is one key alone: run this without --finish first")
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
