package cli

import (
	"bufio"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"tandem/internal/simulate"

	"github.com/spf13/cobra"
)

// simulateFlags are what `tandem simulate` is asked with.
type simulateFlags struct {
	trace, informat, overhead, hostsFile, transcript, migrate string
	hosts, fail, baselines                                    []string
	projects                                                  int
	quiet                                                     bool
	o                                                         simulate.Options
	until                                                     time.Duration
}

// simulate needs no server: it is a world of its own.
func (a *app) simulate() *cobra.Command {
	var f simulateFlags
	c := &cobra.Command{
		Use:   "simulate --trace FILE",
		Short: "Replay a trace of containers, and see what it costs with Tandem and with others",
		Long: `Replays the arrivals and departures of a trace through the real planner on
simulated time, and through what people use instead, in the same run: one VM for
each container, and Kubernetes in VMs of fixed shapes with a cluster autoscaler.
It needs no server and changes nothing.

The trace is CSV with a header, plain or gzip:
  id,arrive_s,life_s,cpu_milli,mem_mib[,project,service,class]
Two public traces are read as they are: azure2017 and openb.

Policies: ` + policyList(),
		Example: `  tandem simulate --trace azure2017_dev.csv.gz --projects 50 --warmup 24h
  tandem simulate --trace my.csv --hosts 32c,128g*20 --fail h-0003@2h --format json
  tandem simulate check out.ndjson`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.runSimulation(cmd.Context(), &f) },
	}
	fs := c.Flags()
	fs.StringVar(&f.trace, "trace", "", "trace to replay (- is standard input)")
	fs.StringVar(&f.informat, "format-in", simulate.FormatAuto, "format of the trace: auto, tandem, azure2017 or openb")
	fs.StringArrayVar(&f.hosts, "hosts", []string{"96c,256g*auto"}, "hosts and how many: 96c,256g*auto, or *12; may be given several times")
	fs.StringVar(&f.hostsFile, "hosts-file", "", "CSV of hosts instead: id,cpu_milli,mem_mib[,zone], or the openb node list")
	fs.IntVar(&f.projects, "projects", 0, "give the services (azure2017: batches) to so many projects, by a Zipf law with s=1")
	fs.StringVar(&f.o.Isolation, "isolation", simulate.IsolationProject, "who shares a machine: project, shared or own")
	fs.StringVar(&f.overhead, "overhead", "0.1c,0.25g", "of each machine: guest kernel, agent and VMM")
	fs.IntVar(&f.o.HA, "ha", 1, "host losses that Tandem guarantees to survive: 0, 1 or 2")
	fs.Float64Var(&f.o.Budget, "budget", 20, "containers that Tandem may move for each 1000 arrivals; -1: no limit")
	fs.DurationVar(&f.o.Boot, "boot", 5*time.Second, "until a booted machine runs containers")
	fs.DurationVar(&f.o.Grow, "grow", time.Second, "until a grown machine has what it grew by")
	fs.DurationVar(&f.o.BaselineBoot, "baseline-boot", time.Minute, "boot of the baselines' VMs")
	fs.DurationVar(&f.o.HostBoot, "host-boot", 0, "until a host that is switched on runs machines")
	fs.StringVar(&f.migrate, "migrate-rate", "1g", "memory that a live migration copies in a second")
	fs.DurationVar(&f.o.Warmup, "warmup", 0, "exclude the first so much from all figures")
	fs.DurationVar(&f.until, "until", 0, "end there (default: the trace's last event, or its end of observation)")
	fs.DurationVar(&f.o.HAEvery, "ha-every", 0, "look only so often whether the loss of any one host could be survived (default: every instant)")
	fs.StringArrayVar(&f.fail, "fail", nil, "let a host fail: HOST@TIME, such as h-0003@90m; may be given several times")
	fs.StringVar(&f.o.Policy, "policy", "", "main policy (default tandem)")
	fs.StringSliceVar(&f.baselines, "baselines", []string{"all"}, "policies to compare with: all, none, or names")
	fs.StringVar(&f.transcript, "transcript", "", "write each event and action of the main policy there, a line of JSON each (gzip if it ends in .gz)")
	fs.BoolVarP(&f.quiet, "quiet", "q", false, "no progress")
	c.AddCommand(a.simulateCheck())
	return c
}

func policyList() string {
	var b strings.Builder
	for _, p := range simulate.Policies() {
		fmt.Fprintf(&b, "\n  %-18s %s", p[0], p[1])
	}
	return b.String()
}

// options turns flags into what the simulator understands.
func (f *simulateFlags) options(stdin io.Reader) (*simulate.Trace, error) {
	var err error
	if f.trace == "" {
		return nil, usageError("--trace FILE is needed: the trace to replay")
	}
	if f.o.Overhead, err = simulate.ParseSize(f.overhead); err != nil {
		return nil, usageError("--overhead: %v", err)
	}
	rate, err := simulate.ParseSize("0c," + f.migrate)
	if err != nil || rate.Memory <= 0 {
		return nil, usageError("--migrate-rate %q: give an amount a second, such as 1g", f.migrate)
	}
	f.o.MigrateRate = rate.Memory
	for _, s := range f.fail {
		host, at, ok := strings.Cut(s, "@")
		t, err := parseSpan(at)
		if !ok || host == "" || err != nil {
			return nil, usageError("--fail %q: write it as HOST@TIME, such as h-0003@90m", s)
		}
		f.o.Fail = append(f.o.Fail, simulate.Failure{Host: host, At: simulate.At(t)})
	}
	switch strings.Join(f.baselines, ",") {
	case "all":
		f.o.Baselines = nil
	case "none", "":
		f.o.Baselines = []string{}
	default:
		f.o.Baselines = f.baselines
	}
	if f.hostsFile != "" {
		file, err := os.Open(f.hostsFile)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		if f.o.Hosts, err = simulate.ReadHosts(file, f.hostsFile); err != nil {
			return nil, err
		}
	} else {
		for _, s := range f.hosts {
			p, err := simulate.ParsePool(s)
			if err != nil {
				return nil, usageError("--hosts: %v", err)
			}
			f.o.Hosts = append(f.o.Hosts, p)
		}
	}
	in := stdin
	if f.trace != "-" {
		file, err := os.Open(f.trace)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		in = file
	}
	t, err := simulate.Read(in, simulate.ReadOptions{Name: f.trace, Format: f.informat})
	if err != nil {
		return nil, err
	}
	if f.until > 0 {
		t.Until = simulate.At(f.until)
	}
	if f.projects != 0 {
		if err := t.Zipf(f.projects); err != nil {
			return nil, usageError("--projects: %v", err)
		}
	}
	return t, nil
}

// parseSpan reads a duration, or a number of seconds.
func parseSpan(s string) (time.Duration, error) {
	if n, err := strconv.ParseFloat(s, 64); err == nil && n >= 0 && n < 1e9 {
		return time.Duration(n * float64(time.Second)), nil
	}
	d, err := time.ParseDuration(s)
	if err == nil && d < 0 {
		return 0, fmt.Errorf("%s is negative", s)
	}
	return d, err
}

func (a *app) runSimulation(ctx context.Context, f *simulateFlags) (err error) {
	trace, err := f.options(a.env.Stdin)
	if err != nil {
		return err
	}
	start := time.Now()
	f.o.Stopwatch = func() time.Duration { return time.Since(start) }
	if !f.quiet {
		f.o.Progress = simulationProgress(a.env.Stderr)
	}
	if f.transcript != "" {
		file, err := os.Create(f.transcript)
		if err != nil {
			return err
		}
		f.o.Transcript = file
		var z *gzip.Writer
		if strings.HasSuffix(f.transcript, ".gz") {
			z = gzip.NewWriter(file)
			f.o.Transcript = z
		}
		defer func() {
			if z != nil {
				if e := z.Close(); err == nil {
					err = e
				}
			}
			if e := file.Close(); err == nil {
				err = e
			}
		}()
	}
	report, err := simulate.Run(ctx, trace, f.o)
	if err != nil {
		return err
	}
	if a.format == "json" {
		return writeJSON(a.env.Stdout, report)
	}
	return report.WriteText(a.env.Stdout)
}

// simulationProgress says about every two seconds how far it is.
func simulationProgress(w io.Writer) func(string, simulate.Time, simulate.Time, int, int) {
	start := time.Now()
	var last time.Time
	policy := ""
	return func(p string, at, end simulate.Time, hosts, machines int) {
		now := time.Now()
		if p == policy && now.Sub(last) < 2*time.Second {
			return
		}
		policy, last = p, now
		fmt.Fprintf(w, "%7.1fs  %-18s %3.0f%%  day %.2f, %d hosts, %d machines\n", now.Sub(start).Seconds(), p, 100*at.Seconds()/max(end.Seconds(), 1e-3), at.Seconds()/86400, hosts, machines)
	}
}

func (a *app) simulateCheck() *cobra.Command {
	return &cobra.Command{
		Use: "check FILE", Short: "Recompute a transcript's figures, and check every rule in it", Args: cobra.ExactArgs(1),
		Long: `Reads a transcript line by line, without the simulator: every rule is checked
again (no host and no machine over its size, projects apart, nobody in two places),
every figure is computed anew and compared with the one the transcript ends with.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			in := a.env.Stdin
			if args[0] != "-" {
				file, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer file.Close()
				in = file
			}
			r, err := simulate.Check(cmd.Context(), bufio.NewReaderSize(in, 1<<20), args[0])
			if err != nil {
				return err
			}
			if a.format == "json" {
				return writeJSON(a.env.Stdout, r)
			}
			return r.WriteText(a.env.Stdout)
		},
	}
}
