package cli

import (
	"context"
	"fmt"
	"sort"
	"strings"
	"time"

	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
)

// selector names what a command acts on: containers by name, or, without any,
// all of the project whose Compose file lies here.
func (a *app) selector(ctx context.Context, args []string) (*v1.Selector, error) {
	project, err := a.projectName(ctx)
	if err != nil {
		return nil, err
	}
	if len(args) == 0 && project == "" {
		return nil, usageError("name a container, or a project with -p (there is no Compose file here)")
	}
	s := &v1.Selector{Project: project}
	if project == "" {
		s.Containers = args
		return s, nil
	}
	api, err := a.api()
	if err != nil {
		return nil, err
	}
	// A word is a service where the project has one of that name, else a container.
	res, err := api.projects().ListServices(ctx, connect.NewRequest(&v1.ListServicesRequest{Project: project}))
	if err != nil {
		return nil, err
	}
	services := map[string]bool{}
	for _, x := range res.Msg.GetServices() {
		services[x.GetMeta().GetName()] = true
	}
	for _, w := range args {
		if services[w] {
			s.Services = append(s.Services, w)
		} else {
			s.Containers = append(s.Containers, w)
		}
	}
	return s, nil
}

func (a *app) names(list []*v1.Container) {
	for _, c := range list {
		fmt.Fprintln(a.env.Stdout, c.GetMeta().GetName())
	}
}

func (a *app) ps() *cobra.Command {
	var all, quiet bool
	c := &cobra.Command{
		Use:   "ps [SERVICE...]",
		Short: "List containers and where they run",
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := a.api()
			if err != nil {
				return err
			}
			req := &v1.ListContainersRequest{Project: a.project, All: all, Services: args}
			if a.project == "" && len(a.files) > 0 {
				if req.Project, err = a.projectName(cmd.Context()); err != nil {
					return err
				}
			}
			res, err := api.containers().List(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			list := res.Msg.GetContainers()
			sort.SliceStable(list, func(i, j int) bool {
				return list[i].GetMeta().GetProject()+"/"+list[i].GetMeta().GetName() < list[j].GetMeta().GetProject()+"/"+list[j].GetMeta().GetName()
			})
			if a.format == "json" {
				return printAll(a, list)
			}
			if quiet {
				for _, x := range list {
					fmt.Fprintln(a.env.Stdout, x.GetMeta().GetId())
				}
				return nil
			}
			where, err := a.places(cmd.Context())
			if err != nil {
				return err
			}
			now := time.Now()
			var rows [][]string
			for _, x := range list {
				rows = append(rows, []string{x.GetMeta().GetName(), x.GetSpec().GetImage(), statusText(x, now),
					where.of(x), addressText(x.GetAssignment()), portsText(x.GetAssignment().GetPorts())})
			}
			if err := a.table("NAME|IMAGE|STATUS|MACHINE|ADDRESS|PORTS", rows); err != nil {
				return err
			}
			for i, s := range res.Msg.GetScales() {
				if i == 0 {
					fmt.Fprintln(a.env.Stdout)
				}
				fmt.Fprintln(a.env.Stdout, printable(scaleLine(s)))
			}
			return nil
		},
	}
	c.Flags().BoolVarP(&all, "all", "a", false, "stopped ones too")
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "only ids")
	return c
}

// places knows names of machines and hosts by id.
type places struct{ machines, hosts map[string]string }

func (a *app) places(ctx context.Context) (*places, error) {
	api, err := a.api()
	if err != nil {
		return nil, err
	}
	ms, err := api.machines().List(ctx, connect.NewRequest(&v1.ListMachinesRequest{}))
	if err != nil {
		return nil, err
	}
	hs, err := api.system().Hosts(ctx, connect.NewRequest(&v1.ListHostsRequest{}))
	if err != nil {
		return nil, err
	}
	p := &places{map[string]string{}, map[string]string{}}
	for _, m := range ms.Msg.GetMachines() {
		p.machines[m.GetMeta().GetId()] = m.GetMeta().GetName()
	}
	for _, h := range hs.Msg.GetHosts() {
		p.hosts[h.GetMeta().GetId()] = h.GetMeta().GetName()
	}
	return p, nil
}

func (p *places) host(id string) string {
	if n := p.hosts[id]; n != "" {
		return n
	}
	return shortID(id)
}

func (p *places) of(c *v1.Container) string {
	as := c.GetAssignment()
	switch {
	case as.GetHostId() == "":
		return "-"
	case as.GetMachineId() == "":
		return p.host(as.GetHostId()) + " (metal)"
	case p.machines[as.GetMachineId()] != "":
		return p.machines[as.GetMachineId()] + " on " + p.host(as.GetHostId())
	}
	return as.GetMachineId() + " on " + p.host(as.GetHostId())
}

func (a *app) start() *cobra.Command {
	return &cobra.Command{
		Use: "start [CONTAINER|SERVICE...]", Short: "Start stopped containers",
		RunE: func(cmd *cobra.Command, args []string) error {
			api, sel, err := a.prepare(cmd.Context(), args)
			if err != nil {
				return err
			}
			res, err := api.containers().Start(cmd.Context(), connect.NewRequest(&v1.StartContainersRequest{Selector: sel}))
			if err != nil {
				return err
			}
			a.names(res.Msg.GetContainers())
			return nil
		},
	}
}

// named is the server and the one container that a user names.
func (a *app) named(ctx context.Context, name string) (*client, string, error) {
	id, err := a.findOne(ctx, name)
	if err != nil {
		return nil, "", err
	}
	api, err := a.api()
	return api, id, err
}

func (a *app) prepare(ctx context.Context, args []string) (*client, *v1.Selector, error) {
	api, err := a.api()
	if err != nil {
		return nil, nil, err
	}
	sel, err := a.selector(ctx, args)
	return api, sel, err
}

// stopLike are stop and restart, which take the same flags.
func (a *app) stopLike(use, short string, call func(*client) func(context.Context, *connect.Request[v1.StopContainersRequest]) (*connect.Response[v1.StopContainersResponse], error)) *cobra.Command {
	var timeout int
	c := &cobra.Command{
		Use: use + " [CONTAINER|SERVICE...]", Short: short,
		RunE: func(cmd *cobra.Command, args []string) error {
			api, sel, err := a.prepare(cmd.Context(), args)
			if err != nil {
				return err
			}
			req := &v1.StopContainersRequest{Selector: sel, Wait: true}
			if cmd.Flags().Changed("time") {
				req.Timeout = durationpb.New(time.Duration(timeout) * time.Second)
			}
			res, err := call(api)(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			a.names(res.Msg.GetContainers())
			return nil
		},
	}
	c.Flags().IntVarP(&timeout, "time", "t", 10, "seconds to wait before killing")
	return c
}

func (a *app) stop() *cobra.Command {
	return a.stopLike("stop", "Stop containers gracefully", func(c *client) func(context.Context, *connect.Request[v1.StopContainersRequest]) (*connect.Response[v1.StopContainersResponse], error) {
		return c.containers().Stop
	})
}

func (a *app) restart() *cobra.Command {
	return a.stopLike("restart", "Stop containers and start them again", func(c *client) func(context.Context, *connect.Request[v1.StopContainersRequest]) (*connect.Response[v1.StopContainersResponse], error) {
		return c.containers().Restart
	})
}

func (a *app) kill() *cobra.Command {
	var signal string
	c := &cobra.Command{
		Use: "kill [CONTAINER|SERVICE...]", Short: "Send a signal to containers",
		RunE: func(cmd *cobra.Command, args []string) error {
			api, sel, err := a.prepare(cmd.Context(), args)
			if err != nil {
				return err
			}
			_, err = api.containers().Kill(cmd.Context(), connect.NewRequest(&v1.KillContainersRequest{Selector: sel, Signal: signal}))
			return err
		},
	}
	c.Flags().StringVarP(&signal, "signal", "s", "KILL", "signal to send")
	return c
}

func (a *app) rm() *cobra.Command {
	var force, volumes bool
	c := &cobra.Command{
		Use: "rm CONTAINER|SERVICE...", Short: "Remove stopped containers",
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, sel, err := a.prepare(cmd.Context(), args)
			if err != nil {
				return err
			}
			res, err := api.containers().Remove(cmd.Context(), connect.NewRequest(&v1.RemoveContainersRequest{Selector: sel, Force: force, Volumes: volumes, Wait: true}))
			if err != nil {
				return err
			}
			fmt.Fprintln(a.env.Stdout, strings.Join(res.Msg.GetRemoved(), "\n"))
			return nil
		},
	}
	c.Flags().BoolVarP(&force, "force", "f", false, "stop running ones first")
	c.Flags().BoolVarP(&volumes, "volumes", "v", false, "remove their anonymous volumes too")
	return c
}

func (a *app) pause() *cobra.Command {
	return a.pauseLike("pause", "Freeze containers", false)
}
func (a *app) unpause() *cobra.Command {
	return a.pauseLike("unpause", "Let frozen containers go on", true)
}

func (a *app) pauseLike(use, short string, resume bool) *cobra.Command {
	return &cobra.Command{
		Use: use + " CONTAINER|SERVICE...", Short: short, Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, sel, err := a.prepare(cmd.Context(), args)
			if err != nil {
				return err
			}
			_, err = api.containers().Pause(cmd.Context(), connect.NewRequest(&v1.PauseContainersRequest{Selector: sel, Resume: resume}))
			return err
		},
	}
}

func (a *app) wait() *cobra.Command {
	var condition string
	c := &cobra.Command{
		Use: "wait CONTAINER", Short: "Wait for a container and print its exit code", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := a.api()
			if err != nil {
				return err
			}
			res, err := api.containers().Wait(cmd.Context(), connect.NewRequest(&v1.WaitContainerRequest{Container: args[0], Project: a.project, Condition: condition}))
			if err != nil {
				return err
			}
			fmt.Fprintln(a.env.Stdout, res.Msg.GetExitCode())
			return nil
		},
	}
	c.Flags().StringVar(&condition, "condition", "exited", "exited, running, healthy or removed")
	return c
}

func (a *app) inspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect CONTAINER...", Short: "Everything known of containers, as JSON", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := a.api()
			if err != nil {
				return err
			}
			var list []*v1.Container
			for _, n := range args {
				res, err := api.containers().Inspect(cmd.Context(), connect.NewRequest(&v1.ContainerRequest{Container: n, Project: a.project}))
				if err != nil {
					return err
				}
				list = append(list, res.Msg)
			}
			return printAll(a, list)
		},
	}
}

// addressText is all addresses of a container.
func addressText(a *v1.Assignment) string {
	if len(a.GetAddresses()) == 0 {
		return a.GetIp()
	}
	var ips []string
	for _, x := range a.Addresses {
		ips = append(ips, x.Ip)
	}
	return strings.Join(ips, ", ")
}
