package cli

import (
	"encoding/json"
	"fmt"
	"runtime"
	"sort"
	"strings"
	"time"

	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func (a *app) plan() *cobra.Command {
	var profiles []string
	var detailed bool
	c := &cobra.Command{
		Use:   "plan",
		Short: "What would happen: for the Compose file here, or for what waits for a place",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.project == "" || len(a.files) > 0 {
				if req, err := a.load(cmd.Context(), profiles, nil, ""); err == nil {
					req.PlanOnly = true
					return a.apply(cmd.Context(), req, detailed)
				} else if len(a.files) > 0 {
					return err
				}
			}
			api, err := a.api()
			if err != nil {
				return err
			}
			res, err := api.system().Plan(cmd.Context(), connect.NewRequest(&v1.PlanRequest{Project: a.project}))
			if err != nil {
				return err
			}
			if a.format == "json" {
				return a.printOne(res.Msg)
			}
			printPlan(a.env.Stdout, res.Msg)
			if detailed && len(res.Msg.GetActions()) > 0 {
				return &exitError{code: ExitChanges}
			}
			return nil
		},
	}
	c.Flags().StringArrayVar(&profiles, "profile", nil, "Compose profile to switch on")
	c.Flags().BoolVar(&detailed, "detailed-exitcode", false, "exit with 3 when there are changes")
	return c
}

func (a *app) explain() *cobra.Command {
	return &cobra.Command{
		Use: "explain CONTAINER", Short: "Why a container runs where it runs", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, id, err := a.named(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			res, err := api.system().Explain(cmd.Context(), connect.NewRequest(&v1.ContainerRequest{Container: id, Project: a.project}))
			if err != nil {
				return err
			}
			m := res.Msg
			if a.format == "json" {
				return a.printOne(m)
			}
			// The text's list of options follows as a table.
			text, _, _ := strings.Cut(m.GetText(), "Weighed, least cost first:")
			for _, l := range strings.Split(strings.TrimSpace(text), "\n") {
				fmt.Fprintln(a.env.Stdout, printable(l))
			}
			var rows [][]string
			for _, o := range m.GetReason().GetOptions() {
				mark := ""
				if o.GetChosen() {
					mark = "chosen"
				}
				var terms []string
				for k, v := range o.GetTerms() {
					terms = append(terms, fmt.Sprintf("%s %.2f", k, v))
				}
				sort.Strings(terms)
				rows = append(rows, []string{o.GetAction(), o.GetMachine(), o.GetHost(), fmt.Sprintf("%.2f", o.GetCost()), fmt.Sprintf("%.1fs", o.GetSeconds()), bytesText(o.GetPinnedBytes()), strings.Join(terms, ", "), mark})
			}
			if len(rows) > 0 {
				fmt.Fprintln(a.env.Stdout)
				if err := a.table("OPTION|MACHINE|HOST|COST|READY IN|PINS|MADE OF|", rows); err != nil {
					return err
				}
			}
			for i, x := range m.GetReason().GetExclusions() {
				if i == 0 {
					fmt.Fprintln(a.env.Stdout, "\nTurned away:")
				}
				fmt.Fprintf(a.env.Stdout, "  %d %s(s) by %s: %s\n", x.GetCount(), x.GetLayer(), x.GetRule(), printable(x.GetDetail()))
			}
			return nil
		},
	}
}

func (a *app) doctor() *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "What this host can do, and the remedy for what it can't", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			api, err := a.api()
			if err != nil {
				return err
			}
			res, err := api.system().Doctor(cmd.Context(), connect.NewRequest(&v1.DoctorRequest{}))
			if errdefs.IsUnavailable(err) && a.env.Doctor == nil && a.env.Whole != nil {
				return a.env.Whole()
			}
			if errdefs.IsUnavailable(err) && a.env.Doctor != nil {
				fmt.Fprintf(a.env.Stderr, "%v: checking this computer instead.\n", err)
				return printFindings(a.env, a.format, a.env.Doctor(cmd.Context()))
			}
			if err != nil {
				return err
			}
			return printFindings(a.env, a.format, res.Msg.GetFindings())
		},
	}
}

// printFindings shows a doctor's findings; an error among them gives exit code 1.
func printFindings(env Env, format string, list []*v1.Finding) error {
	a := &app{env: env, format: format}
	bad := 0
	for _, f := range list {
		if f.GetSeverity() == "error" {
			bad++
		}
	}
	if format == "json" {
		if err := printAll(a, list); err != nil {
			return err
		}
	} else {
		marks := map[string]string{"ok": "✓", "info": "·", "warning": "!", "error": "✗"}
		for _, f := range list {
			fmt.Fprintf(env.Stdout, "%s %s\n", marks[f.GetSeverity()], printable(f.GetTitle()))
			if f.GetDetail() != "" && f.GetSeverity() != "ok" {
				fmt.Fprintf(env.Stdout, "    %s\n", printable(f.GetDetail()))
			}
			if f.GetRemedy() != "" && f.GetSeverity() != "ok" {
				fmt.Fprintf(env.Stdout, "    remedy: %s\n", printable(f.GetRemedy()))
			}
		}
	}
	if bad > 0 {
		return &exitError{code: ExitFailed, text: fmt.Sprintf("%d finding(s) must be mended before Tandem can work here", bad)}
	}
	return nil
}

func (a *app) version() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Versions of this command and of the server", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var server *v1.VersionResponse
			api, err := a.api()
			if err == nil {
				var res *connect.Response[v1.VersionResponse]
				if res, err = api.system().Version(cmd.Context(), connect.NewRequest(&v1.VersionRequest{})); err == nil {
					server = res.Msg
				}
			}
			if a.format == "json" {
				out := map[string]any{"client": map[string]string{"version": a.env.Version, "go_version": runtime.Version()}}
				if server != nil {
					raw, jerr := jsonOf(server)
					if jerr != nil {
						return jerr
					}
					out["server"] = json.RawMessage(raw)
				}
				return writeJSON(a.env.Stdout, out)
			}
			fmt.Fprintf(a.env.Stdout, "client  %s (%s)\n", a.env.Version, runtime.Version())
			if server == nil {
				fmt.Fprintf(a.env.Stdout, "server  not reached: %v\n", err)
				return nil
			}
			fmt.Fprintf(a.env.Stdout, "server  %s (%s), cluster %s\n", server.GetVersion(), server.GetGoVersion(), server.GetClusterId())
			return nil
		},
	}
}

func (a *app) events() *cobra.Command {
	var since, until string
	var noFollow bool
	c := &cobra.Command{
		Use: "events", Short: "What happens, as it happens", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			api, err := a.api()
			if err != nil {
				return err
			}
			req := &v1.EventsRequest{Project: a.project, Follow: !noFollow && until == ""}
			if req.Since, err = parseWhen(since); err != nil {
				return err
			}
			if req.Until, err = parseWhen(until); err != nil {
				return err
			}
			st, err := api.system().Events(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			defer st.Close()
			for st.Receive() {
				e := st.Msg()
				if a.format == "json" {
					// One object a line: the stream has no end.
					raw, err := jsonOf(e)
					if err != nil {
						return err
					}
					if err := json.NewEncoder(a.env.Stdout).Encode(raw); err != nil {
						return err
					}
					continue
				}
				var attrs []string
				for k, v := range e.GetAttributes() {
					attrs = append(attrs, k+"="+v)
				}
				sort.Strings(attrs)
				fmt.Fprintln(a.env.Stdout, printable(fmt.Sprintf("%s  %-9s %-20s %s %s", e.GetAt().AsTime().Local().Format("2006-01-02 15:04:05.000"), e.GetKind(), e.GetAction(), e.GetName(), strings.Join(attrs, " "))))
			}
			return st.Err()
		},
	}
	c.Flags().StringVar(&since, "since", "", "from this time or so long ago")
	c.Flags().StringVar(&until, "until", "", "up to this time, then end")
	c.Flags().BoolVar(&noFollow, "no-follow", false, "end after what has happened already")
	return c
}

func (a *app) stats() *cobra.Command {
	var noStream, machines bool
	c := &cobra.Command{
		Use: "stats [CONTAINER|SERVICE...]", Short: "What containers and machines use",
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := a.api()
			if err != nil {
				return err
			}
			sel := &v1.Selector{Project: a.project}
			if len(args) > 0 {
				if sel, err = a.selector(cmd.Context(), args); err != nil {
					return err
				}
			}
			st, err := api.containers().Stats(cmd.Context(), connect.NewRequest(&v1.StatsRequest{Selector: sel, Stream: !noStream, Machines: machines}))
			if err != nil {
				return err
			}
			defer st.Close()
			for st.Receive() {
				if a.format == "json" {
					if err := printAll(a, st.Msg().GetRows()); err != nil {
						return err
					}
					continue
				}
				if !noStream {
					fmt.Fprint(a.env.Stdout, "\x1b[H\x1b[2J")
				}
				var rows [][]string
				for _, r := range st.Msg().GetRows() {
					u := r.GetUsage()
					rows = append(rows, []string{r.GetName(), r.GetKind(), r.GetMachine(), fmt.Sprintf("%.1f%%", r.GetCpuPercent()),
						bytesText(u.GetMemoryBytes()) + " / " + bytesText(u.GetMemoryLimitBytes()), bytesText(int64(u.GetNetRxBytes())) + " / " + bytesText(int64(u.GetNetTxBytes())),
						bytesText(int64(u.GetBlockReadBytes())) + " / " + bytesText(int64(u.GetBlockWriteBytes())), fmt.Sprint(u.GetPids())})
				}
				if err := a.table("NAME|KIND|MACHINE|CPU|MEMORY|NET IN / OUT|BLOCK IN / OUT|PIDS", rows); err != nil {
					return err
				}
			}
			return st.Err()
		},
	}
	c.Flags().BoolVar(&noStream, "no-stream", false, "once, then end")
	c.Flags().BoolVar(&machines, "machines", false, "machines too")
	return c
}

func (a *app) top() *cobra.Command {
	return &cobra.Command{
		Use: "top CONTAINER|SERVICE", Short: "Processes of a container", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, id, err := a.named(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			res, err := api.containers().Top(cmd.Context(), connect.NewRequest(&v1.ContainerRequest{Container: id, Project: a.project}))
			if err != nil {
				return err
			}
			if a.format == "json" {
				return printAll(a, res.Msg.GetProcesses())
			}
			var rows [][]string
			for _, p := range res.Msg.GetProcesses() {
				rows = append(rows, []string{fmt.Sprint(p.GetPid()), fmt.Sprint(p.GetPpid()), p.GetUser(), p.GetState(), bytesText(p.GetRssBytes()),
					(time.Duration(p.GetCpuMs()) * time.Millisecond).Round(10 * time.Millisecond).String(), p.GetCommand()})
			}
			return a.table("PID|PPID|USER|STATE|MEMORY|CPU TIME|COMMAND", rows)
		},
	}
}
