package cli

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
)

// as returns cmd as a command that runs do with the user's session.
func (a *app) as(cmd *cobra.Command, out *output, do func(ctx context.Context, p *person, args []string) error) *cobra.Command {
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := a.person(cmd.Context())
		if err != nil {
			return err
		}
		defer p.end()
		return do(cmd.Context(), p, args)
	}
	if out != nil {
		out.flag(cmd)
	}
	return cmd
}

func (a *app) keyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "key", Short: "Manage a team's API keys", Long: "Manage a team's API keys. Use `wrenn login` first, or be root where `wrenn up` runs."}
	cmd.AddCommand(a.keyCurrentCommand(), a.keyCreateCommand(), a.keyListCommand(), a.keyRemoveCommand(), a.keyRotateSecretCommand())
	return cmd
}

// adminKey is the variable of the first admin's API key in the server's environment file.
const adminKey = "WRENN_ADMIN_API_KEY"

func (a *app) keyCurrentCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "current", Short: "Print the API key that the commands use", Args: exactly(0),
		Long: `Print the API key that the commands use: the one of --api-key or WRENN_API_KEY, else
the one of ` + "`wrenn login`" + `, else the one of ` + "`wrenn up`" + ` on this machine. With --file, print the
first admin's key from the server's environment file.`,
		RunE: func(*cobra.Command, []string) (err error) {
			var key string
			if file != "" {
				key, err = variable(file, adminKey)
			} else {
				_, key, err = a.service()
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.out, key)
			return err
		},
	}
	cmd.Flags().StringVar(&file, "file", "", "the server's environment file, such as /etc/wrenn/server.env")
	return cmd
}

// variable returns the value of a variable in one of systemd's environment files.
func variable(file, name string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+"="); ok {
			return strings.Trim(value, `"'`), nil
		}
	}
	return "", fmt.Errorf("%s does not set %s", file, name)
}

func (a *app) keyCreateCommand() *cobra.Command {
	var out output
	var scopes []string
	var expires time.Duration
	cmd := a.as(&cobra.Command{
		Use: "create NAME", Short: "Create an API key and print it (it is shown only once)", Args: exactly(1),
	}, &out, func(ctx context.Context, p *person, args []string) error {
		o := client.KeyOptions{Name: args[0], Scopes: scopes}
		if expires < 0 {
			return usage("--expires %s: want a positive duration", expires)
		}
		if expires > 0 {
			at := time.Now().Add(expires).UTC()
			o.ExpiresAt = &at
		}
		k, err := p.CreateKey(ctx, o)
		if err != nil {
			return err
		}
		return a.made(out, k, k.Key)
	})
	cmd.Flags().StringSliceVar(&scopes, "scope", nil, "scope: sandboxes, templates, read-only or platform; repeatable (default: sandboxes and templates)")
	cmd.Flags().DurationVar(&expires, "expires", 0, "time until it expires, as in 720h (default: never)")
	return cmd
}

func (a *app) keyListCommand() *cobra.Command {
	var out output
	return a.as(&cobra.Command{Use: "ls", Short: "List API keys", Args: exactly(0)}, &out, func(ctx context.Context, p *person, _ []string) error {
		keys, err := p.Keys(ctx)
		if err != nil {
			return err
		}
		if out.format == "json" {
			if keys == nil {
				keys = []client.Key{}
			}
			return a.json(keys)
		}
		rows := [][]string{{"ID", "NAME", "PREFIX", "SCOPES", "MADE BY", "LAST USED", "EXPIRES"}}
		for _, k := range keys {
			rows = append(rows, []string{k.ID, k.Name, k.Prefix + "…", first(strings.Join(k.Scopes, ","), "all"), k.CreatedBy, day(k.LastUsedAt), day(k.ExpiresAt)})
		}
		return a.table(rows)
	})
}

// day formats a time for lists.
func day(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return t.Local().Format(time.DateTime)
}

func (a *app) keyRemoveCommand() *cobra.Command {
	return a.as(&cobra.Command{Use: "rm KEY...", Short: "Revoke API keys, by id", Args: atLeast(1)}, nil, func(ctx context.Context, p *person, args []string) error {
		for _, k := range args {
			if err := p.RevokeKey(ctx, k); err != nil {
				return fmt.Errorf("%s: %w", k, err)
			}
			fmt.Fprintln(a.out, k)
		}
		return nil
	})
}
