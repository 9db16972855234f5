package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	v1 "tandem/api/tandem/v1"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Exit codes of the command.
const (
	ExitDone    = 0
	ExitFailed  = 1
	ExitUsage   = 2
	ExitChanges = 3 // --detailed-exitcode: the plan has changes
)

// DefaultSocket is where `tandem serve` listens unless told otherwise.
const DefaultSocket = "/run/tandem/tandem.sock"

// Env is the world around the command; tests give their own.
type Env struct {
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	Getenv func(string) string
	// Version is what `tandem version` prints for the client.
	Version string
	// Doctor checks this computer itself; used when no server answers.
	Doctor func(ctx context.Context) []*v1.Finding
	// Extra commands that are not faces of the API: serve, agent, guest, ...
	Extra []*cobra.Command
	// State are commands of `tandem state` that work without a server: restore.
	State []*cobra.Command
	// Compose reads Compose files; see package compose.
	Compose func(ctx context.Context, o ComposeFiles) (*v1.ApplyProjectRequest, []string, error)
	// Whole makes this process the program that has all of the above. It is called
	// where one of them is needed and nil, and comes back only with an error.
	Whole func() error
}

// ComposeFiles are those that the flags name, as compose.Options has them.
type ComposeFiles struct {
	Files              []string
	WorkingDir         string
	ProjectName        string
	Profiles, EnvFiles []string
}

// app holds what all commands share.
type app struct {
	env     Env
	socket  string
	format  string
	project string
	files   []string
	c       *client
}

// exitError ends the command with a code and, when text is not empty, a message.
type exitError struct {
	code int
	text string
}

func (e *exitError) Error() string { return e.text }

// usageError marks wrong use of a command.
func usageError(format string, a ...any) error {
	return &exitError{code: ExitUsage, text: fmt.Sprintf(format, a...)}
}

// Groups of commands in the help.
const (
	groupRun    = "run"
	groupLook   = "look"
	groupParts  = "parts"
	groupDecide = "decide"
	groupSystem = "system"
)

// New returns the command tree.
func New(env Env) *cobra.Command { return commands(env, "") }

// entry is one command of the tree.
type entry struct {
	name, group string
	parts       bool // it has commands below it
	make        func(*app) *cobra.Command
}

var entries = []entry{
	{"up", groupRun, false, (*app).up}, {"down", groupRun, false, (*app).down}, {"run", groupRun, false, (*app).run},
	{"exec", groupRun, false, (*app).exec}, {"start", groupRun, false, (*app).start}, {"stop", groupRun, false, (*app).stop},
	{"restart", groupRun, false, (*app).restart}, {"kill", groupRun, false, (*app).kill}, {"rm", groupRun, false, (*app).rm},
	{"scale", groupRun, false, (*app).scale}, {"attach", groupRun, false, (*app).attach}, {"pause", groupRun, false, (*app).pause},
	{"unpause", groupRun, false, (*app).unpause}, {"update", groupRun, false, (*app).update}, {"wait", groupRun, false, (*app).wait},
	{"ps", groupLook, false, (*app).ps}, {"logs", groupLook, false, (*app).logs}, {"stats", groupLook, false, (*app).stats},
	{"top", groupLook, false, (*app).top}, {"events", groupLook, false, (*app).events}, {"inspect", groupLook, false, (*app).inspect},
	{"picture", groupLook, false, (*app).picture},
	{"plan", groupDecide, false, (*app).plan}, {"explain", groupDecide, false, (*app).explain}, {"rebalance", groupDecide, false, (*app).rebalance},
	{"consolidate", groupDecide, false, (*app).consolidate}, {"rehearse", groupDecide, true, (*app).rehearse},
	{"what-if", groupDecide, false, (*app).whatIf}, {"recommend", groupDecide, false, (*app).recommend},
	{"policy", groupDecide, false, (*app).policyCmd}, {"simulate", groupDecide, true, (*app).simulate},
	{"machine", groupParts, true, (*app).machine}, {"image", groupParts, true, (*app).image}, {"volume", groupParts, true, (*app).volume},
	{"host", groupParts, true, (*app).hostCmd}, {"pool", groupParts, true, (*app).pool}, {"quota", groupParts, true, (*app).quota},
	{"doctor", groupSystem, false, (*app).doctor}, {"version", groupSystem, false, (*app).version}, {"state", groupSystem, true, (*app).state},
}

// first is the command that args begin with: "" when that is not plain to see.
func first(args []string) (only string, parts bool) {
	for _, e := range entries {
		if len(args) > 0 && args[0] == e.name {
			return e.name, e.parts
		}
	}
	return "", false
}

// commands makes the whole tree, or, to start faster, one of its commands.
func commands(env Env, only string) *cobra.Command {
	if env.Getenv == nil {
		env.Getenv = os.Getenv
	}
	a := &app{env: env}
	root := &cobra.Command{
		Use:   "tandem",
		Short: "Virtual machines and containers, placed together",
		Long: `Tandem runs your containers inside virtual machines and decides both together:
which machine a container goes to, when a machine grows, when another one boots,
and says why.

  tandem up                    run the Compose file that lies here
  tandem ps                    what runs, and where
  tandem explain shop-web-1    why it runs there
  tandem doctor                what this host can do`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			text := fmt.Sprintf("no command %q", args[0])
			if near := c.SuggestionsFor(args[0]); len(near) > 0 {
				text += "; did you mean " + strings.Join(near, " or ") + "?"
			}
			return usageError("%s\nTry 'tandem --help'.", text)
		},
		Args:          cobra.ArbitraryArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		CompletionOptions: cobra.CompletionOptions{
			DisableDefaultCmd: only != "",
		},
	}
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	root.AddGroup(
		&cobra.Group{ID: groupRun, Title: "Run things:"},
		&cobra.Group{ID: groupLook, Title: "Look at things:"},
		&cobra.Group{ID: groupDecide, Title: "Understand decisions:"},
		&cobra.Group{ID: groupParts, Title: "Parts:"},
		&cobra.Group{ID: groupSystem, Title: "The system itself:"},
	)
	root.SetHelpCommandGroupID(groupSystem)
	root.SetCompletionCommandGroupID(groupSystem)
	pf := root.PersistentFlags()
	socket := env.Getenv("TANDEM_HOST")
	if socket == "" {
		socket = "unix://" + DefaultSocket
	}
	pf.StringVarP(&a.socket, "host", "H", socket, "server to talk to: unix:///path (env TANDEM_HOST)")
	pf.StringVar(&a.format, "format", "text", "how to print: text or json")
	// Before the command -f and -p are the Compose file and the project; after it
	// they are what Docker's users know: rm -f forces, run -p publishes.
	root.TraverseChildren = true
	compose := func(fs *pflag.FlagSet, f, p string) {
		fs.StringArrayVarP(&a.files, "file", f, nil, "Compose file; may be given several times")
		fs.StringVarP(&a.project, "project-name", p, env.Getenv("COMPOSE_PROJECT_NAME"), "project (env COMPOSE_PROJECT_NAME)")
	}
	compose(root.Flags(), "f", "p")
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError("%v\nTry '%s --help'.", err, c.CommandPath())
	})
	root.PersistentPreRunE = func(c *cobra.Command, _ []string) error {
		if a.format != "text" && a.format != "json" {
			return usageError("--format is text or json, not %q", a.format)
		}
		return nil
	}
	for _, e := range entries {
		if only == "" || only == e.name {
			c := e.make(a)
			c.GroupID = e.group
			root.AddCommand(c)
		}
	}
	for _, c := range root.Commands() {
		if c.HasSubCommands() {
			continue
		}
		short := func(s string) string {
			if c.Flags().ShorthandLookup(s) != nil {
				return ""
			}
			return s
		}
		compose(c.Flags(), short("f"), short("p"))
	}
	if only != "" {
		return root
	}
	for _, c := range env.Extra {
		if c.GroupID == "" && !c.Hidden {
			c.GroupID = groupSystem
		}
		root.AddCommand(c)
	}
	return root
}

// Alone is true for arguments that Run can carry out as far as can be seen
// without Extra, State, Compose and Doctor: help, completion and what is not known
// here are for the program that has them.
func Alone(env Env, args []string) bool {
	if only, parts := first(args); only != "" && !parts {
		return true
	}
	c, _, err := New(env).Find(args)
	return err == nil && c.HasParent() && !c.HasSubCommands()
}

// Run executes the command and returns its exit code.
func Run(ctx context.Context, env Env, args []string) int {
	only, _ := first(args)
	root := commands(env, only)
	root.SetArgs(args)
	return exitCode(ctx, env, root.ExecuteContext(ctx))
}

// Exit ends the process as Run's error would: with a message and a code.
func Exit(env Env, err error) { os.Exit(exitCode(context.Background(), env, err)) }

func exitCode(ctx context.Context, env Env, err error) int {
	if err == nil {
		return ExitDone
	}
	var ee *exitError
	if errors.As(err, &ee) {
		if ee.text != "" {
			fmt.Fprintln(env.Stderr, "tandem: "+ee.text)
		}
		return ee.code
	}
	if errors.Is(err, context.Canceled) || ctx.Err() != nil {
		fmt.Fprintln(env.Stderr, "tandem: interrupted; what was asked for goes on in the background where it had begun")
		return 130
	}
	fmt.Fprintln(env.Stderr, "tandem: "+explainError(err))
	if strings.Contains(err.Error(), "arg(s)") {
		return ExitUsage
	}
	return ExitFailed
}

// explainError adds the next step where the class of an error tells it.
func explainError(err error) string {
	msg := err.Error()
	switch {
	case errdefs.IsUnavailable(err) && strings.Contains(msg, "no server at"):
		return msg + "\nIs the server running? Start it with: sudo tandem serve"
	case errdefs.IsPermissionDenied(err) && strings.Contains(msg, "no permission for the server"):
		return msg + "\nThe server's socket belongs to root; use sudo, or ask to be put in its group."
	}
	return msg
}
