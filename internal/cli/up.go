package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
)

// compose reads Compose files, in this process or in the one that can.
func (a *app) compose(ctx context.Context, o ComposeFiles) (*v1.ApplyProjectRequest, []string, error) {
	if a.env.Compose == nil && a.env.Whole != nil {
		return nil, nil, a.env.Whole()
	}
	o.Files = a.files
	return a.env.Compose(ctx, o)
}

// load reads the Compose files that the flags name.
func (a *app) load(ctx context.Context, profiles, envFiles []string, dir string) (*v1.ApplyProjectRequest, error) {
	req, warnings, err := a.compose(ctx, ComposeFiles{WorkingDir: dir, ProjectName: a.project, Profiles: profiles, EnvFiles: envFiles})
	if err != nil {
		return nil, err
	}
	for _, w := range warnings {
		fmt.Fprintln(a.env.Stderr, "warning: "+w)
	}
	return req, nil
}

// projectName is the project that commands without a Compose file speak of:
// --project-name, else the Compose file here, else none.
func (a *app) projectName(ctx context.Context) (string, error) {
	if a.project != "" {
		return a.project, nil
	}
	if len(a.files) == 0 && !composeHere(a.env.Getenv) {
		return "", nil
	}
	req, _, err := a.compose(ctx, ComposeFiles{Profiles: []string{"*"}})
	if err != nil {
		if len(a.files) > 0 || a.env.Compose == nil {
			return "", err
		}
		return "", nil
	}
	return req.GetProject(), nil
}

// composeHere is false where no Compose file can be meant: neither this directory
// nor one above it has one of the usual name, and nothing says another.
func composeHere(getenv func(string) string) bool {
	if getenv("COMPOSE_FILE") != "" {
		return true
	}
	dir, err := os.Getwd()
	if err != nil {
		return true
	}
	for {
		for _, name := range []string{"compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml", ".env"} {
			if _, err := os.Stat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
				return true
			}
		}
		up := filepath.Dir(dir)
		if up == dir {
			return false
		}
		dir = up
	}
}

// ofProject is the server and the project that a command without a service is for.
func (a *app) ofProject(ctx context.Context) (*client, string, error) {
	api, err := a.api()
	if err != nil {
		return nil, "", err
	}
	name, err := a.projectName(ctx)
	if err == nil && name == "" {
		err = usageError("no Compose file here: name the project with -p, or the file with -f")
	}
	return api, name, err
}

func (a *app) up() *cobra.Command {
	var (
		plan, detach, orphans, force, noRecreate, detailed, noStart bool
		profiles, envFiles, scale                                   []string
		dir                                                         string
		timeout                                                     time.Duration
		revision                                                    uint64
	)
	c := &cobra.Command{
		Use:   "up [SERVICE...]",
		Short: "Make a Compose file's services run",
		Long: `Reads the Compose file here (or -f FILE), changes only what differs from what
runs, and waits until every service runs and is healthy. --plan prints what would
happen, with the reasons, and changes nothing; --revision of what it printed then
does that, or nothing if the state has changed since.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := a.load(cmd.Context(), profiles, envFiles, dir)
			if err != nil {
				return err
			}
			for _, s := range scale {
				name, n, ok := strings.Cut(s, "=")
				count, err := strconv.ParseInt(n, 10, 32)
				i := slices.IndexFunc(req.Services, func(x *v1.ServiceSpec) bool { return x.Name == name })
				if !ok || err != nil || count < 0 || i < 0 {
					return usageError("--scale %q: give SERVICE=NUMBER with a service of the file", s)
				}
				req.Services[i].Replicas = int32(count)
			}
			req.Only, req.PlanOnly, req.Wait, req.Revision = args, plan, !detach, revision
			req.RemoveOrphans, req.ForceRecreate, req.NoRecreate, req.NoStart = orphans, force, noRecreate, noStart
			if timeout > 0 {
				req.Timeout = durationpb.New(timeout)
			}
			return a.apply(cmd.Context(), req, detailed)
		},
	}
	f := c.Flags()
	f.BoolVar(&plan, "plan", false, "print actions and reasons, change nothing")
	f.BoolVar(&detailed, "detailed-exitcode", false, "with --plan: exit with 3 when there are changes")
	f.BoolVarP(&detach, "detach", "d", false, "do not wait until everything runs")
	f.BoolVar(&orphans, "remove-orphans", false, "remove services that the file no longer has")
	f.BoolVar(&force, "force-recreate", false, "replace containers even when nothing changed")
	f.BoolVar(&noRecreate, "no-recreate", false, "leave existing containers as they are")
	f.BoolVar(&noStart, "no-start", false, "create, but do not start")
	f.StringArrayVar(&profiles, "profile", nil, "Compose profile to switch on")
	f.StringArrayVar(&envFiles, "env-file", nil, "file with variables for the Compose file")
	f.StringArrayVar(&scale, "scale", nil, "SERVICE=NUMBER, overrides the file")
	f.StringVar(&dir, "project-directory", "", "directory that relative paths start from")
	f.Uint64Var(&revision, "revision", 0, "the revision of a plan: change nothing if the state has changed since")
	f.DurationVar(&timeout, "timeout", 0, "give up waiting after this (default: never)")
	return c
}

// apply sends a project and shows what happens.
func (a *app) apply(ctx context.Context, req *v1.ApplyProjectRequest, detailed bool) error {
	api, err := a.api()
	if err != nil {
		return err
	}
	st, err := api.projects().Apply(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer st.Close()
	pr := newProgress(a.env.Stderr)
	var result *v1.ApplyResult
	changes := false
	for st.Receive() {
		switch k := st.Msg().GetKind().(type) {
		case *v1.ApplyProjectResponse_Plan:
			changes = len(k.Plan.GetActions()) > 0
			if req.PlanOnly && a.format == "json" {
				if err := a.printOne(k.Plan); err != nil {
					return err
				}
			} else if req.PlanOnly {
				printPlan(a.env.Stdout, k.Plan)
			} else {
				for _, n := range k.Plan.GetNotes() {
					fmt.Fprintln(a.env.Stderr, "note: "+printable(n))
				}
				for _, u := range k.Plan.GetUnplaced() {
					fmt.Fprintf(a.env.Stderr, "warning: %s has no place yet: %s. %s\n", u.GetContainer(), u.GetReason().GetSummary(), u.GetRemedy())
				}
			}
			for _, w := range k.Plan.GetWarnings() {
				fmt.Fprintln(a.env.Stderr, "warning: "+printable(w))
			}
		case *v1.ApplyProjectResponse_Progress:
			pr.step(k.Progress)
		case *v1.ApplyProjectResponse_Result:
			result = k.Result
		}
	}
	if err := st.Err(); err != nil {
		return err
	}
	if req.PlanOnly {
		if detailed && changes {
			return &exitError{code: ExitChanges}
		}
		return nil
	}
	if a.format == "json" && result != nil {
		return a.printOne(result)
	}
	if result.GetUnchanged() {
		fmt.Fprintf(a.env.Stderr, "%s: nothing to change\n", req.GetProject())
	}
	return nil
}

// printPlan shows actions, each with its reason.
func printPlan(w io.Writer, p *v1.Plan) {
	for _, n := range p.GetNotes() {
		fmt.Fprintln(w, "Note: "+printable(n)+".")
	}
	if len(p.GetActions()) == 0 && len(p.GetUnplaced()) == 0 {
		fmt.Fprintln(w, "Nothing to change.")
		return
	}
	for i, x := range p.GetActions() {
		fmt.Fprintf(w, "%3d. %s\n", i+1, printable(actionText(x)))
		if s := x.GetReason().GetSummary(); s != "" && s != x.GetText() {
			fmt.Fprintf(w, "     because: %s\n", printable(s))
		}
	}
	for _, u := range p.GetUnplaced() {
		fmt.Fprintf(w, "  ✗  %s has no place: %s\n", u.GetContainer(), printable(u.GetReason().GetSummary()))
		if u.GetRemedy() != "" {
			fmt.Fprintf(w, "     remedy: %s\n", printable(u.GetRemedy()))
		}
	}
	if t := totalsText(p.GetTotals()); t != "" {
		fmt.Fprintln(w, "In all: "+t+".")
	}
	if p.GetRevision() > 0 {
		fmt.Fprintf(w, "As of revision %d.\n", p.GetRevision())
	}
}

func actionText(x *v1.PlanAction) string {
	if x.GetText() != "" {
		return x.GetText()
	}
	s := x.GetKind()
	for _, part := range []string{x.GetContainer(), x.GetMachine(), x.GetHost()} {
		if part != "" {
			s += " " + part
		}
	}
	if x.GetTo() != nil {
		s += " to " + sizeText(x.GetTo())
	}
	return s
}

func (a *app) down() *cobra.Command {
	var volumes bool
	var timeout int
	c := &cobra.Command{
		Use:   "down",
		Short: "Stop and remove a project's containers and networks",
		Long: `Stops a project's containers, those first that need others, and removes them with
the project's networks. Of a project that is not there, nothing is left to do.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			api, name, err := a.ofProject(cmd.Context())
			if err != nil {
				return err
			}
			req := &v1.RemoveProjectRequest{Project: name, Volumes: volumes, Wait: true}
			if cmd.Flags().Changed("timeout") {
				if timeout < 0 {
					return usageError("--timeout %d: give a number of seconds", timeout)
				}
				req.Timeout = durationpb.New(time.Duration(timeout) * time.Second)
			}
			st, err := api.projects().Remove(cmd.Context(), connect.NewRequest(req))
			if err == nil {
				err = a.follow(st)
			}
			if errdefs.IsNotFound(err) {
				fmt.Fprintf(a.env.Stderr, "warning: no project %s: there is nothing to remove\n", printable(name))
				return nil
			}
			return err
		},
	}
	c.Flags().BoolVarP(&volumes, "volumes", "v", false, "remove its named volumes too, with their data")
	c.Flags().IntVarP(&timeout, "timeout", "t", 10, "seconds that each container has to stop, instead of its own stop_grace_period")
	return c
}

// follow shows a stream of progress until it ends.
func (a *app) follow(st *connect.ServerStreamForClient[v1.Progress]) error {
	defer st.Close()
	pr := newProgress(a.env.Stderr)
	for st.Receive() {
		pr.step(st.Msg())
	}
	return st.Err()
}

func (a *app) scale() *cobra.Command {
	var detach bool
	c := &cobra.Command{
		Use:   "scale SERVICE=NUMBER...",
		Short: "Change how many containers a service has",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, name, err := a.ofProject(cmd.Context())
			if err != nil {
				return err
			}
			req := &v1.ScaleRequest{Project: name, Replicas: map[string]int32{}, Wait: !detach}
			for _, s := range args {
				svc, n, ok := strings.Cut(s, "=")
				count, err := strconv.ParseInt(n, 10, 32)
				if !ok || err != nil || count < 0 {
					return usageError("%q: give SERVICE=NUMBER", s)
				}
				req.Replicas[svc] = int32(count)
			}
			st, err := api.projects().Scale(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			return a.follow(st)
		},
	}
	c.Flags().BoolVarP(&detach, "detach", "d", false, "do not wait")
	return c
}
