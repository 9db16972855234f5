package cli

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
)

// totalsText sums a plan up in words; empty when there is nothing to sum up.
func totalsText(t *v1.PlanTotals) string {
	var parts []string
	add := func(n int32, one, many string) {
		if n == 1 {
			parts = append(parts, "1 "+one)
		} else if n > 1 {
			parts = append(parts, fmt.Sprintf("%d %s", n, many))
		}
	}
	add(t.GetContainerMoves(), "container moves", "containers move")
	add(t.GetMachineMoves(), "machine migrates", "machines migrate")
	if t.GetMoveBytes() > 0 {
		parts = append(parts, bytesText(t.GetMoveBytes())+" of memory to move")
	}
	add(t.GetPlaced(), "container gets a place", "containers get a place")
	add(t.GetBoots(), "machine boots", "machines boot")
	add(t.GetGrown(), "machine grows", "machines grow")
	add(t.GetRestarts(), "machine starts again", "machines start again")
	add(t.GetStops(), "machine stops", "machines stop")
	add(t.GetEvicted(), "container gives way", "containers give way")
	add(t.GetHostsOn(), "host goes on", "hosts go on")
	add(t.GetHostsOff(), "host goes off", "hosts go off")
	add(t.GetUnplaced(), "container has no place", "containers have no place")
	if s := t.GetSeconds(); s > 0 {
		parts = append(parts, fmt.Sprintf("%.1f s one after the other", s))
	}
	return strings.Join(parts, ", ")
}

// moveFlags are what rebalance and consolidate share.
type moveFlags struct {
	plan, detailed    bool
	moves, migrations int32
	bytes             string
	revision          uint64
}

func (m *moveFlags) add(c *cobra.Command) {
	f := c.Flags()
	f.BoolVar(&m.plan, "plan", false, "print the steps and their reasons, change nothing")
	f.Int32Var(&m.moves, "moves", 20, "move at most so many containers; -1: any number")
	f.Int32Var(&m.migrations, "migrations", -1, "migrate at most so many machines while they run; -1: any number")
	f.StringVar(&m.bytes, "bytes", "", "let migrations copy at most so much memory, such as 16g (default: any amount)")
	f.Uint64Var(&m.revision, "revision", 0, "the revision of a plan: change nothing if the state has changed since")
	f.BoolVar(&m.detailed, "detailed-exitcode", false, "with --plan: exit with 3 when there are steps")
}

func (m *moveFlags) budget() (*v1.MoveBudget, error) {
	b := &v1.MoveBudget{Moves: m.moves, Migrations: m.migrations, Bytes: -1}
	if m.bytes != "" {
		n, err := resource.ParseMemory(m.bytes)
		if err != nil {
			return nil, usageError("--bytes: %v", err)
		}
		b.Bytes = n
	}
	return b, nil
}

func (a *app) rebalance() *cobra.Command {
	var m moveFlags
	c := &cobra.Command{
		Use:   "rebalance",
		Short: "What moves would mend broken rules and spread replicas",
		Long: `Asks the planner for the moves that make things better without emptying hosts:
rules that what runs breaks are mended, replicas spread over hosts. The plan says
what moves where, why, and what it costs. Without --plan the server carries it out,
two moves at a time, or refuses it and says which step it can't do.`,
		Example: `  tandem rebalance --plan --moves 5 --bytes 8g`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := m.budget()
			if err != nil {
				return err
			}
			return a.ask(cmd.Context(), &v1.AskRequest{Question: &v1.AskRequest_Rebalance{Rebalance: &v1.RebalanceQuestion{Budget: b}}}, &m)
		},
	}
	m.add(c)
	return c
}

func (a *app) consolidate() *cobra.Command {
	var m moveFlags
	q := &v1.ConsolidateQuestion{}
	c := &cobra.Command{
		Use:   "consolidate",
		Short: "What moves would let fewer hosts do",
		Long: `Asks the planner how to need fewer hosts: those with the fewest containers are
emptied, all or nothing, into machines that there are. Without --plan the server
carries it out, or refuses it and says which step it can't do.`,
		Example: `  tandem consolidate --plan --hosts 1 --power-off`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if q.Budget, err = m.budget(); err != nil {
				return err
			}
			return a.ask(cmd.Context(), &v1.AskRequest{Question: &v1.AskRequest_Consolidate{Consolidate: q}}, &m)
		},
	}
	m.add(c)
	c.Flags().Int32Var(&q.Hosts, "hosts", 0, "empty at most so many hosts (default: any number)")
	c.Flags().BoolVar(&q.PowerOff, "power-off", false, "switch off hosts that run nothing")
	c.Flags().Int32Var(&q.KeepOn, "keep-on", 0, "leave so many empty hosts on")
	return c
}

// ask puts a question, shows the answer and, without --plan, has it carried out.
func (a *app) ask(ctx context.Context, q *v1.AskRequest, m *moveFlags) error {
	api, err := a.api()
	if err != nil {
		return err
	}
	if m.plan && m.revision != 0 {
		return usageError("--revision goes without --plan: it carries out a plan that was printed before")
	}
	if m.plan {
		res, err := api.system().Ask(ctx, connect.NewRequest(q))
		if err != nil {
			return err
		}
		if err := a.answer(res.Msg, res.Msg.GetPlan()); err != nil {
			return err
		}
		if m.detailed && len(res.Msg.GetPlan().GetActions()) > 0 {
			return &exitError{code: ExitChanges}
		}
		return nil
	}
	revision := m.revision
	if revision == 0 {
		res, err := api.system().Ask(ctx, connect.NewRequest(q))
		if err != nil {
			return err
		}
		revision = res.Msg.GetPlan().GetRevision()
	}
	res, err := api.system().CarryOut(ctx, connect.NewRequest(&v1.CarryOutRequest{Question: q, Revision: revision}))
	if err != nil {
		return err
	}
	if a.format == "json" {
		return a.printOne(res.Msg)
	}
	printPlan(a.env.Stdout, res.Msg.GetPlan())
	return nil
}

// answer prints what was assumed, what would happen, and which losses are covered.
func (a *app) answer(r *v1.AskResponse, p *v1.Plan) error {
	if a.format == "json" {
		return a.printOne(r)
	}
	for _, s := range r.GetAssumptions() {
		fmt.Fprintln(a.env.Stdout, "What if: "+printable(s))
	}
	if p != nil {
		printPlan(a.env.Stdout, p)
	}
	for _, w := range r.GetPlan().GetWarnings() {
		fmt.Fprintln(a.env.Stderr, "warning: "+printable(w))
	}
	l := r.GetLosses()
	if l == nil {
		return nil
	}
	if p != nil {
		fmt.Fprintln(a.env.Stdout)
	}
	var rows [][]string
	for _, x := range l.GetLosses() {
		all := "yes"
		if !x.GetCovered() {
			all = fmt.Sprintf("no: %d without a place", x.GetUnplaced())
		}
		rows = append(rows, []string{x.GetHost(), fmt.Sprint(x.GetContainers()), all})
	}
	if err := a.table("LOSS OF|CONTAINERS|COVERED", rows); err != nil {
		return err
	}
	if l.GetCovered() {
		fmt.Fprintln(a.env.Stdout, "Everything would find a place after the loss of any one host.")
	} else {
		fmt.Fprintln(a.env.Stdout, "Not every loss is covered.")
	}
	return nil
}

func (a *app) rehearse() *cobra.Command {
	var detailed bool
	run := func(cmd *cobra.Command, q *v1.AskRequest, whole bool) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		res, err := api.system().Ask(cmd.Context(), connect.NewRequest(q))
		if err != nil {
			return err
		}
		p := res.Msg.GetPlan()
		if !whole {
			p = nil
		}
		if err := a.answer(res.Msg, p); err != nil {
			return err
		}
		if l := res.Msg.GetLosses(); detailed && (len(res.Msg.GetPlan().GetUnplaced()) > 0 || l != nil && !l.GetCovered()) {
			return &exitError{code: ExitChanges}
		}
		return nil
	}
	lose := &cobra.Command{
		Use:   "lose [HOST...]",
		Short: "What would go where if hosts were lost, all at once; without HOST, whether each loss is covered",
		Long: `Asks where all that runs on these hosts would start again if they were lost now, all
at once: which machine or container goes where, and what would have no place. The
table after it says of every host whether all of it would find a place if that host
alone were lost. Nothing changes.`,
		Example:           "  tandem rehearse lose alpha\n  tandem rehearse lose --detailed-exitcode    # exit code 3: some loss is not covered",
		ValidArgsFunction: a.completeHosts,
		RunE: func(cmd *cobra.Command, args []string) error {
			return run(cmd, &v1.AskRequest{Question: &v1.AskRequest_Lose{Lose: &v1.LoseQuestion{Hosts: args}}}, len(args) > 0)
		},
	}
	empty := &cobra.Command{
		Use: "empty HOST...", Short: "What would go where if hosts were to run nothing, for maintenance", Args: cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeHosts,
		RunE: func(cmd *cobra.Command, args []string) error {
			return run(cmd, &v1.AskRequest{Question: &v1.AskRequest_Empty{Empty: &v1.EmptyQuestion{Hosts: args}}}, true)
		},
	}
	for _, c := range []*cobra.Command{lose, empty} {
		c.Flags().BoolVar(&detailed, "detailed-exitcode", false, "exit with 3 when something would have no place")
	}
	return parent("rehearse", "Play through what may happen to hosts, without doing anything", lose, empty)
}

func (a *app) whatIf() *cobra.Command {
	var add, remove, scale []string
	var detailed bool
	c := &cobra.Command{
		Use:   "what-if",
		Short: "What would happen with other hosts, or other numbers of containers",
		Long: `Asks the planner what would become of all that needs a place after changes that
nobody makes: hosts added or removed, services with more or fewer containers.`,
		Example: `  tandem what-if --add-host 96c,256g*3
  tandem what-if --remove-host beta --scale shop/web=12`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			q := &v1.WhatIfQuestion{RemoveHosts: remove}
			for _, s := range add {
				h, err := parseHosts(s)
				if err != nil {
					return err
				}
				q.AddHosts = append(q.AddHosts, h)
			}
			for _, s := range scale {
				name, n, ok := strings.Cut(s, "=")
				count, err := strconv.ParseInt(n, 10, 32)
				if !ok || err != nil || count < 0 || name == "" {
					return usageError("--scale %q: give SERVICE=NUMBER, or PROJECT/SERVICE=NUMBER", s)
				}
				project, service, ok := strings.Cut(name, "/")
				if !ok {
					service = name
					if project, err = a.projectName(cmd.Context()); err != nil {
						return err
					}
					if project == "" {
						return usageError("--scale %q: no Compose file here: write PROJECT/%s, or name the project with -p", s, s)
					}
				}
				q.Scale = append(q.Scale, &v1.ServiceReplicas{Project: project, Service: service, Replicas: int32(count)})
			}
			if len(add)+len(remove)+len(scale) == 0 {
				return usageError("what if what? Give --add-host, --remove-host or --scale\nTry '%s --help'.", cmd.CommandPath())
			}
			api, err := a.api()
			if err != nil {
				return err
			}
			res, err := api.system().Ask(cmd.Context(), connect.NewRequest(&v1.AskRequest{Question: &v1.AskRequest_WhatIf{WhatIf: q}}))
			if err != nil {
				return err
			}
			if err := a.answer(res.Msg, res.Msg.GetPlan()); err != nil {
				return err
			}
			if detailed && len(res.Msg.GetPlan().GetUnplaced()) > 0 {
				return &exitError{code: ExitChanges}
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringArrayVar(&add, "add-host", nil, "hosts of a size, such as 96c,256g or 96c,256g*3; may be given several times")
	f.StringArrayVar(&remove, "remove-host", nil, "a host that is not there; may be given several times")
	f.StringArrayVar(&scale, "scale", nil, "[PROJECT/]SERVICE=NUMBER; may be given several times")
	f.BoolVar(&detailed, "detailed-exitcode", false, "exit with 3 when something would have no place")
	must := func(err error) {
		if err != nil {
			panic(err) // the flag is not there: a mistake above
		}
	}
	must(c.RegisterFlagCompletionFunc("add-host", cobra.NoFileCompletions))
	must(c.RegisterFlagCompletionFunc("remove-host", a.completeHosts))
	must(c.RegisterFlagCompletionFunc("scale", a.completeServices))
	return c
}

// parseHosts reads "96c,256g*3".
func parseHosts(s string) (*v1.AddedHosts, error) {
	text, number, many := strings.Cut(s, "*")
	h := &v1.AddedHosts{Count: 1}
	if many {
		n, err := strconv.ParseInt(number, 10, 32)
		if err != nil || n < 1 || n > math.MaxInt32 {
			return nil, usageError("--add-host %q: after * comes how many, such as 96c,256g*3", s)
		}
		h.Count = int32(n)
	}
	z, err := resource.ParseSize(text)
	if err != nil {
		return nil, usageError("--add-host %q: %v", s, err)
	}
	if z.CPU <= 0 || z.Memory <= 0 {
		return nil, usageError("--add-host %q: a host has both CPU and memory, such as 96c,256g", s)
	}
	h.Size = &v1.Size{CpuMilli: z.CPU, MemoryBytes: z.Memory}
	return h, nil
}

// completeHosts offers the names of hosts to the shell.
func (a *app) completeHosts(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
	api, err := a.api()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	res, err := api.system().Hosts(cmd.Context(), connect.NewRequest(&v1.ListHostsRequest{}))
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, h := range res.Msg.GetHosts() {
		if n := h.GetMeta().GetName(); strings.HasPrefix(n, word) {
			out = append(out, printable(n))
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// completeServices offers PROJECT/SERVICE= to the shell.
func (a *app) completeServices(cmd *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
	api, err := a.api()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	res, err := api.projects().ListServices(cmd.Context(), connect.NewRequest(&v1.ListServicesRequest{Project: a.project}))
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, s := range res.Msg.GetServices() {
		if n := s.GetMeta().GetProject() + "/" + s.GetMeta().GetName() + "="; strings.HasPrefix(n, word) {
			out = append(out, printable(n))
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}
