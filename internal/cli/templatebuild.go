package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/templates"
)

// shippedStepTimeout is the time for one step of a shipped recipe, in seconds. Such a
// step installs many packages, and its guest may be emulated.
const shippedStepTimeout = 3600

func (a *app) templateBuildCommand() *cobra.Command {
	return &cobra.Command{
		Use: "build NAME…", Short: "Build templates that Wrenn ships: " + strings.Join(templates.Names(), ", "), Args: atLeast(1),
		Long:      "Build templates from the recipes that are built into Wrenn: " + strings.Join(templates.Names(), ", ") + ".\n`wrenn build` builds your own recipes.",
		ValidArgs: templates.Names(),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.each(args, func(name string) error { return a.buildShipped(cmd, c, name) })
		},
	}
}

func (a *app) buildShipped(cmd *cobra.Command, c *client.Client, name string) (err error) {
	folder, err := templates.Folder(name)
	if errors.Is(err, fs.ErrNotExist) {
		return usage("%s: Wrenn ships %s", name, strings.Join(templates.Names(), ", "))
	}
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "wrenn-"+name+"-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.CopyFS(dir, folder); err != nil {
		return err
	}
	o := client.BuildOptions{Name: name, StepTimeoutSeconds: shippedStepTimeout, PhaseTimeoutSeconds: shippedStepTimeout}
	b, err := startBuild(cmd.Context(), c, o, dir, "")
	if err != nil {
		return err
	}
	fmt.Fprintf(a.err, "build %s\n", b.ID)
	return a.follow(cmd.Context(), c, b.ID)
}
