package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func (a *app) machine() *cobra.Command {
	ls := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List machines", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		res, err := api.machines().List(cmd.Context(), connect.NewRequest(&v1.ListMachinesRequest{Project: a.project}))
		if err != nil {
			return err
		}
		if a.format == "json" {
			return printAll(a, res.Msg.GetMachines())
		}
		pl, err := a.places(cmd.Context())
		if err != nil {
			return err
		}
		cs, err := api.containers().List(cmd.Context(), connect.NewRequest(&v1.ListContainersRequest{All: true}))
		if err != nil {
			return err
		}
		count := map[string]int{}
		for _, c := range cs.Msg.GetContainers() {
			count[c.GetAssignment().GetMachineId()]++
		}
		var rows [][]string
		for _, m := range res.Msg.GetMachines() {
			rows = append(rows, []string{m.GetMeta().GetName(), machineStateText(m), pl.host(m.GetHostId()), sizeText(m.GetStatus().GetSize()),
				sizeText(m.GetCeiling()), fmt.Sprint(count[m.GetMeta().GetId()]), machineOwner(m), startText(m)})
		}
		return a.table("NAME|STATE|HOST|SIZE|CEILING|CONTAINERS|FOR|STARTED BY", rows)
	}}
	call := func(use, short string, f func(cmd *cobra.Command, api *client, r *v1.MachineRequest) (*v1.Machine, error)) *cobra.Command {
		var force bool
		c := &cobra.Command{Use: use + " MACHINE", Short: short, Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			api, err := a.api()
			if err != nil {
				return err
			}
			m, err := f(cmd, api, &v1.MachineRequest{Machine: args[0], Wait: true, Force: force})
			if err != nil {
				return err
			}
			if use == "inspect" || a.format == "json" {
				return a.printOne(m)
			}
			fmt.Fprintln(a.env.Stdout, m.GetMeta().GetName())
			return nil
		}}
		if use == "stop" || use == "rm" {
			c.Flags().BoolVarP(&force, "force", "f", false, "even with containers in it")
		}
		return c
	}
	inspect := call("inspect", "Everything known of a machine", func(cmd *cobra.Command, api *client, r *v1.MachineRequest) (*v1.Machine, error) {
		res, err := api.machines().Inspect(cmd.Context(), connect.NewRequest(r))
		return msgOf(res), err
	})
	start := call("start", "Start a stopped machine", func(cmd *cobra.Command, api *client, r *v1.MachineRequest) (*v1.Machine, error) {
		res, err := api.machines().Start(cmd.Context(), connect.NewRequest(r))
		return msgOf(res), err
	})
	stop := call("stop", "Stop a machine and keep it", func(cmd *cobra.Command, api *client, r *v1.MachineRequest) (*v1.Machine, error) {
		res, err := api.machines().Stop(cmd.Context(), connect.NewRequest(r))
		return msgOf(res), err
	})
	rm := call("rm", "Remove a machine", func(cmd *cobra.Command, api *client, r *v1.MachineRequest) (*v1.Machine, error) {
		_, err := api.machines().Remove(cmd.Context(), connect.NewRequest(r))
		return &v1.Machine{Meta: &v1.Meta{Name: r.Machine}}, err
	})
	return parent("machine", "Virtual machines", ls, inspect, a.machineCreate(), start, stop, rm, a.machineResize(), a.machineConsole())
}

func msgOf[T any](r *connect.Response[T]) *T {
	if r == nil {
		return nil
	}
	return r.Msg
}

func machineStateText(m *v1.Machine) string {
	s := m.GetStatus().GetState()
	if s == v1.MachineState_MACHINE_STATE_UNSPECIFIED {
		return "pending"
	}
	t := enumText(s.String(), "MACHINE_STATE_")
	if msg := m.GetStatus().GetMessage(); msg != "" && s != v1.MachineState_MACHINE_STATE_RUNNING {
		t += ": " + msg
	}
	return t
}

func machineOwner(m *v1.Machine) string {
	switch {
	case m.GetMeta().GetProject() != "":
		return "project " + m.GetMeta().GetProject()
	default:
		return isolationText(m.GetIsolation())
	}
}

func startText(m *v1.Machine) string {
	s := m.GetStatus()
	if s.GetStartMethod() == "" {
		return "-"
	}
	return fmt.Sprintf("%s in %.1fs", s.GetStartMethod(), s.GetStartDuration().AsDuration().Seconds())
}

func (a *app) machineCreate() *cobra.Command {
	var cpus, memory, maxCPUs, maxMemory, isolation, host, project string
	c := &cobra.Command{Use: "create [NAME]", Short: "Make and start a machine of your own", Args: cobra.MaximumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		req := &v1.CreateMachineRequest{Host: host, Project: project, Wait: true}
		if len(args) > 0 {
			req.Name = args[0]
		}
		if req.Size, err = parseSize(cpus, memory); err != nil {
			return err
		}
		if req.Ceiling, err = parseSize(maxCPUs, maxMemory); err != nil {
			return err
		}
		if req.Isolation, _, err = parseWhere(isolation, "latency"); err != nil {
			return err
		}
		res, err := api.machines().Create(cmd.Context(), connect.NewRequest(req))
		if err != nil {
			return err
		}
		if a.format == "json" {
			return a.printOne(res.Msg)
		}
		fmt.Fprintln(a.env.Stdout, res.Msg.GetMeta().GetName())
		return nil
	}}
	f := c.Flags()
	f.StringVar(&cpus, "cpus", "", "CPUs it starts with")
	f.StringVarP(&memory, "memory", "m", "", "memory it starts with, guest overhead included")
	f.StringVar(&maxCPUs, "max-cpus", "", "how far it may grow")
	f.StringVar(&maxMemory, "max-memory", "", "how far it may grow")
	f.StringVar(&isolation, "isolation", "project", "project or shared")
	f.StringVar(&host, "on", "", "host")
	f.StringVar(&project, "project", "", "project whose containers it takes")
	return c
}

func (a *app) machineResize() *cobra.Command {
	var cpus, memory string
	c := &cobra.Command{Use: "resize MACHINE", Short: "Grow or shrink a running machine", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		size, err := parseSize(cpus, memory)
		if err != nil {
			return err
		}
		if size == nil {
			return usageError("give --cpus, --memory or both")
		}
		api, err := a.api()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(cmd.Context())
		told := make(chan struct{})
		go func() { defer close(told); a.tellSize(ctx, api, args[0]) }()
		res, err := api.machines().Resize(ctx, connect.NewRequest(&v1.ResizeMachineRequest{Machine: args[0], Size: size, Wait: true}))
		cancel()
		<-told
		if err != nil {
			return err
		}
		if a.format == "json" {
			return a.printOne(res.Msg)
		}
		fmt.Fprintf(a.env.Stdout, "%s: %s\n", res.Msg.GetMeta().GetName(), sizeText(res.Msg.GetStatus().GetSize()))
		return nil
	}}
	c.Flags().StringVar(&cpus, "cpus", "", "CPUs")
	c.Flags().StringVarP(&memory, "memory", "m", "", "memory, guest overhead included")
	return c
}

// tellSize says on standard error how far a machine is, and what it waits for, each
// time that changes, until ctx ends; of what is quick it says nothing.
func (a *app) tellSize(ctx context.Context, api *client, machine string) {
	p := newProgress(a.env.Stderr)
	every := time.NewTicker(time.Second)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-every.C:
		}
		res, err := api.machines().Inspect(ctx, connect.NewRequest(&v1.MachineRequest{Machine: machine}))
		if err != nil {
			continue // Resize says why, if it is to stay so
		}
		m := res.Msg
		p.step(&v1.Progress{Id: m.GetMeta().GetName(), Action: sizeText(m.GetStatus().GetSize()) + " of " + sizeText(m.GetSize()), Message: m.GetStatus().GetMessage()})
	}
}

func (a *app) machineConsole() *cobra.Command {
	return &cobra.Command{Use: "console MACHINE", Short: "A machine's serial console (Ctrl-] leaves)", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		st := api.machines().Console(cmd.Context())
		if err := st.Send(&v1.StreamInput{Kind: &v1.StreamInput_Console{Console: &v1.ConsoleSpec{MachineId: args[0]}}}); err != nil {
			if _, rerr := st.Receive(); rerr != nil {
				return rerr
			}
			return err
		}
		env := a.env
		env.Stdin = &escapeReader{r: a.env.Stdin}
		b := *a
		b.env = env
		if f, ok := a.env.Stdin.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			fmt.Fprint(a.env.Stderr, "Connected; Ctrl-] leaves.\r\n")
			if old, err := term.MakeRaw(int(f.Fd())); err == nil {
				defer term.Restore(int(f.Fd()), old)
			}
		}
		s := &session{a: &b, st: st, stdin: true}
		_, err = s.run(cmd.Context())
		return err
	}}
}

// escapeReader ends at Ctrl-].
type escapeReader struct{ r io.Reader }

func (e *escapeReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	if i := strings.IndexByte(string(p[:n]), 0x1d); i >= 0 {
		return i, io.EOF
	}
	return n, err
}
