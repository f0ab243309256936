package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/recipe"
	"github.com/wrenn-dev/wrenn/internal/recipe/buildcontext"
)

// recipeFiles are the names of a folder's recipe, in order of preference.
var recipeFiles = []string{"Recipe", "Dockerfile"}

func (a *app) buildCommand() *cobra.Command {
	var (
		o           client.BuildOptions
		refs        []string
		file        string
		step, phase time.Duration
		detach      bool
		registry    client.Registry
		fromInput   bool
	)
	cmd := &cobra.Command{
		Use: "build -t NAME[:TAG] [FOLDER]", Short: "Build a template from a recipe, and print its name and version",
		Long: "Build a template from the recipe in a folder: its file Recipe, or a Dockerfile that only uses what recipes have.\n" +
			"If the recipe copies files, wrenn packs and uploads the folder, except what .wrennignore or .dockerignore lists.",
		Example: "  wrenn build -t hello .\n  wrenn build -t hello:v2 -t hello:latest -f recipes/Recipe --step-timeout 10m .",
		Args:    counted(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir := "."
			if len(args) == 1 {
				dir = args[0]
			}
			for _, ref := range refs {
				name, tag, tagged := strings.Cut(ref, ":")
				if o.Name != "" && o.Name != name {
					return usage("-t %s: all tags must have the same name", ref)
				}
				o.Name = name
				if !tagged {
					tag = "latest"
				}
				o.Tags = append(o.Tags, tag)
			}
			if o.Name == "" {
				return usage("-t NAME is required")
			}
			o.StepTimeoutSeconds, o.PhaseTimeoutSeconds = int(step.Seconds()), int(phase.Seconds())
			if fromInput != (registry.Username != "") {
				return usage("--username and --password-stdin go together")
			}
			if fromInput {
				password, err := a.readPassword()
				if err != nil {
					return err
				}
				registry.Password = password
				o.Registry = &registry
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			b, err := startBuild(cmd.Context(), c, o, dir, file)
			if err != nil {
				return err
			}
			if detach {
				_, err = fmt.Fprintln(a.out, b.ID)
				return err
			}
			fmt.Fprintf(a.err, "build %s\n", b.ID)
			return a.follow(cmd.Context(), c, b.ID)
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&refs, "tag", "t", nil, "NAME[:TAG] of the template; repeatable, for several tags")
	f.StringVarP(&file, "file", "f", "", "recipe file (default FOLDER/Recipe, else FOLDER/Dockerfile)")
	f.BoolVar(&o.NoCache, "no-cache", false, "run every step, and keep no layers for later builds")
	f.BoolVar(&o.SkipPrePost, "skip-pre-post", false, "do not update apt's lists before the recipe, nor clean up after it")
	f.IntVar(&o.VCPUs, "vcpus", 0, "virtual CPUs (default: the base's)")
	f.IntVar(&o.MemoryMiB, "memory", 0, "memory in MiB (default: the base's)")
	f.IntVar(&o.DiskMiB, "disk", 0, "disk in MiB (default: the base's)")
	f.DurationVar(&step, "step-timeout", 0, "time for one step (default: the server's, 30s)")
	f.DurationVar(&phase, "phase-timeout", 0, "time for one step before or after the recipe (default: the server's, 10m)")
	f.StringVarP(&registry.Username, "username", "u", "", "user name for the registry of FROM oci:")
	f.BoolVar(&fromInput, "password-stdin", false, "read the registry's password from standard input")
	f.BoolVarP(&detach, "detach", "d", false, "print the build's id and return")
	cmd.AddCommand(a.buildLsCommand(), a.buildShowCommand(), a.buildFollowCommand(), a.buildCancelCommand())
	return cmd
}

// startBuild reads the recipe in a folder, uploads the folder if the recipe copies
// files, and queues the build.
func startBuild(ctx context.Context, c *client.Client, o client.BuildOptions, dir, file string) (*client.Build, error) {
	copies, err := readRecipe(&o, dir, file)
	if err != nil {
		return nil, err
	}
	if copies {
		if o.Archive, err = upload(ctx, c, dir); err != nil {
			return nil, err
		}
	}
	return c.Build(ctx, o)
}

// readRecipe reads the recipe into o and reports whether it copies files.
func readRecipe(o *client.BuildOptions, dir, file string) (copies bool, err error) {
	names := []string{file}
	if file == "" {
		names = nil
		for _, n := range recipeFiles {
			names = append(names, filepath.Join(dir, n))
		}
	}
	var text []byte
	for _, n := range names {
		if text, err = os.ReadFile(n); !errors.Is(err, os.ErrNotExist) {
			file = n
			break
		}
	}
	if errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("there is no %s", strings.Join(names, " and no "))
	}
	if err != nil {
		return false, err
	}
	r, err := recipe.Parse(string(text))
	var wrong recipe.Errors
	if errors.As(err, &wrong) {
		var lines []string
		for _, e := range wrong {
			lines = append(lines, file+":"+e.Error())
		}
		return false, errors.New(strings.Join(lines, "\n"))
	}
	if err != nil {
		return false, err
	}
	o.Recipe = string(text)
	for _, s := range r.Steps {
		if _, is := s.(*recipe.Copy); is {
			copies = true
		}
	}
	return copies, nil
}

// upload packs a folder and uploads it.
func upload(ctx context.Context, c *client.Client, dir string) (string, error) {
	tmp, err := os.CreateTemp("", "wrenn-build-")
	if err != nil {
		return "", err
	}
	defer tmp.Close()
	if err := os.Remove(tmp.Name()); err != nil { // the file goes away with its descriptor
		return "", err
	}
	digest, err := buildcontext.Pack(ctx, tmp, dir, buildcontext.Limits{})
	if err != nil {
		return "", err
	}
	if _, err := tmp.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	return string(digest), c.UploadArchive(ctx, string(digest), tmp)
}

// follow prints a build's progress, and at the end the template's name and version.
func (a *app) follow(ctx context.Context, c *client.Client, id string) error {
	total := 0
	if b, err := c.GetBuild(ctx, id); err == nil {
		total = b.TotalSteps
	}
	bol := true // at the beginning of a line
	b, err := c.FollowBuild(ctx, id, func(e client.BuildEvent) {
		line := func(format string, args ...any) {
			if !bol {
				fmt.Fprintln(a.err)
			}
			bol = true
			fmt.Fprintln(a.err, clean(fmt.Sprintf(format, args...)))
		}
		switch {
		case e.Type == "output":
			for part := range strings.Lines(e.Data) {
				text, whole := strings.CutSuffix(part, "\n")
				if bol {
					fmt.Fprint(a.err, "  ")
				}
				fmt.Fprint(a.err, clean(strings.TrimSuffix(text, "\r")))
				if bol = whole; whole {
					fmt.Fprintln(a.err)
				}
			}
		case e.Type == "step" && e.Step != nil && e.Step.State == "running":
			line("[%d/%d] %s", e.Step.Number, total, e.Step.Text)
		case e.Type == "step" && e.Step != nil && e.Step.State == "cached":
			line("[%d/%d] %s: cached", e.Step.Number, total, e.Step.Text)
		case e.Type == "step" && e.Step != nil && e.Step.State == "succeeded" && e.Step.DurationMS >= 1000:
			line("  %.1f s", float64(e.Step.DurationMS)/1000)
		}
	})
	if err != nil {
		return err
	}
	switch b.State {
	case "succeeded":
		_, err = fmt.Fprintf(a.out, "%s@%d\n", b.Name, b.Version)
		return err
	case "cancelled":
		return errors.New("the build was cancelled")
	}
	return fmt.Errorf("the build failed: %s", clean(b.Error))
}

func (a *app) buildLsCommand() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List builds, newest first", Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list := []client.Build{}
			for b, err := range c.Builds(cmd.Context()) {
				if err != nil {
					return err
				}
				list = append(list, b)
			}
			if out.format == "json" {
				return a.json(list)
			}
			rows := [][]string{{"ID", "NAME", "STATE", "STEPS", "CREATED", "ERROR"}}
			for _, b := range list {
				name := b.Name
				if b.Version > 0 {
					name += "@" + strconv.Itoa(b.Version)
				}
				rows = append(rows, []string{b.ID, name, b.State, fmt.Sprintf("%d/%d", b.DoneSteps, b.TotalSteps), b.CreatedAt.Format(time.DateTime), strings.SplitN(b.Error, "\n", 2)[0]})
			}
			return a.table(rows)
		},
	}
	out.flag(cmd)
	return cmd
}

func (a *app) buildShowCommand() *cobra.Command {
	return &cobra.Command{
		Use: "show BUILD", Short: "Show a build with its steps, as JSON", Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			b, err := c.GetBuild(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.json(b)
		},
	}
}

func (a *app) buildFollowCommand() *cobra.Command {
	return &cobra.Command{
		Use: "logs BUILD", Short: "Print a build's log, and follow it to its end", Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.follow(cmd.Context(), c, args[0])
		},
	}
}

func (a *app) buildCancelCommand() *cobra.Command {
	return &cobra.Command{
		Use: "cancel BUILD…", Short: "Cancel builds", Args: atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.each(args, func(id string) error {
				_, err := c.CancelBuild(cmd.Context(), id)
				return err
			})
		},
	}
}
