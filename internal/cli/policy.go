package cli

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"
)

func (a *app) policyCmd() *cobra.Command {
	var losses int32
	c := &cobra.Command{
		Use:   "policy",
		Short: "What holds for the whole cluster, and how it is kept",
		Long: `Shows the guarantee for host losses, pools and quotas. With --host-losses it sets
the guarantee: room is kept so that after the loss of one host, or of any two at the
same time, all that can start again elsewhere has a place. Nothing new is placed that
would break this. Services that should not have it say x-tandem: {ha: false}.`,
		Example: `  tandem policy
  tandem policy --host-losses 1`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("host-losses") {
				return a.changePolicy(cmd.Context(), &v1.ChangePolicyRequest{HostLosses: &losses}, a.printPolicy)
			}
			return a.seePolicy(cmd.Context(), a.printPolicy)
		},
	}
	c.Flags().Int32Var(&losses, "host-losses", 0, "how many hosts may be lost at the same time: 0, 1 or 2")
	return c
}

func (a *app) pool() *cobra.Command {
	ls := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List pools", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.seePolicy(cmd.Context(), a.printPools) }}
	var reserve, limit string
	var shares int64
	set := &cobra.Command{
		Use:   "set PATH",
		Short: "Make a pool, or change it",
		Long: `Makes a pool or replaces what one says. Pools are nested by their paths: what runs in
/teams/shop counts in /teams, too. A service is in a pool by x-tandem: {pool: PATH}, a
container by tandem run --pool. The reservation is kept for what is in the pool, the
limit is the most that all in it reserve, and shares decide who comes first among
siblings when not all fits.`,
		Example: `  tandem pool set /teams --limit 64c,256g
  tandem pool set /teams/shop --reserve 8c,32g --shares 2000`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p := &v1.Pool{Path: args[0], Shares: shares}
			var err error
			if p.Reservation, err = sizeFlag("reserve", reserve); err != nil {
				return err
			}
			if p.Limit, err = sizeFlag("limit", limit); err != nil {
				return err
			}
			return a.changePolicy(cmd.Context(), &v1.ChangePolicyRequest{Pools: []*v1.Pool{p}}, a.printPools)
		},
	}
	f := set.Flags()
	f.StringVar(&reserve, "reserve", "", "kept for what is in the pool, such as 4c,16g (default: nothing)")
	f.StringVar(&limit, "limit", "", "most that all in it reserve, such as 8c,32g (default: no limit)")
	f.Int64Var(&shares, "shares", 1000, "weight among its siblings when not all fits")
	rm := &cobra.Command{Use: "rm PATH...", Short: "Take pools' bounds away; what runs in them goes on", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changePolicy(cmd.Context(), &v1.ChangePolicyRequest{RemovePools: args}, a.printPools)
		}}
	return parent("pool", "Pools: shares of the cluster, nested", ls, set, rm)
}

func (a *app) quota() *cobra.Command {
	ls := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List the projects that have a quota", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.seePolicy(cmd.Context(), a.printQuotas) }}
	var reserved string
	q := &v1.Quota{}
	set := &cobra.Command{
		Use:   "set PROJECT",
		Short: "Bound what a project may have",
		Long: `Bounds a project: what its containers reserve together, how many of them have a
place, and its machines. What is there already stays; nothing more gets a place.`,
		Example: `  tandem quota set shop --reserved 16c,64g --containers 100 --machines 4`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if q.Reserved, err = sizeFlag("reserved", reserved); err != nil {
				return err
			}
			q.Project = args[0]
			return a.changePolicy(cmd.Context(), &v1.ChangePolicyRequest{Quotas: []*v1.Quota{q}}, a.printQuotas)
		},
	}
	f := set.Flags()
	f.StringVar(&reserved, "reserved", "", "most that its containers reserve together, such as 16c,64g (default: no bound)")
	f.Int32Var(&q.Containers, "containers", 0, "most containers that have a place (default: no bound)")
	f.Int32Var(&q.Machines, "machines", 0, "most machines (default: no bound)")
	rm := &cobra.Command{Use: "rm PROJECT...", Short: "Take quotas away", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changePolicy(cmd.Context(), &v1.ChangePolicyRequest{RemoveQuotas: args}, a.printQuotas)
		}}
	return parent("quota", "Quotas: bounds of projects", ls, set, rm)
}

// sizeFlag reads "4c,16g"; nothing is no size.
func sizeFlag(flag, text string) (*v1.Size, error) {
	if text == "" {
		return nil, nil
	}
	z, err := resource.ParseSize(text)
	if err != nil {
		return nil, usageError("--%s: %v", flag, err)
	}
	return &v1.Size{CpuMilli: z.CPU, MemoryBytes: z.Memory}, nil
}

func (a *app) seePolicy(ctx context.Context, show func(*v1.PolicyResponse) error) error {
	api, err := a.api()
	if err != nil {
		return err
	}
	res, err := api.system().Policy(ctx, connect.NewRequest(&v1.PolicyRequest{}))
	if err != nil {
		return err
	}
	return show(res.Msg)
}

func (a *app) changePolicy(ctx context.Context, r *v1.ChangePolicyRequest, show func(*v1.PolicyResponse) error) error {
	api, err := a.api()
	if err != nil {
		return err
	}
	res, err := api.system().ChangePolicy(ctx, connect.NewRequest(r))
	if err != nil {
		return err
	}
	return show(res.Msg)
}

func (a *app) printPolicy(p *v1.PolicyResponse) error {
	if a.format == "json" {
		return a.printOne(p)
	}
	out := a.env.Stdout
	switch n := p.GetPolicy().GetHostLosses(); n {
	case 0:
		fmt.Fprintln(out, "No room is kept for the loss of a host; tandem policy --host-losses 1 keeps some.")
	default:
		what := "any one host"
		if n > 1 {
			what = fmt.Sprintf("any %d hosts at the same time", n)
		}
		fmt.Fprintf(out, "Room is kept for the loss of %s: %d containers have a place then.\n", what, p.GetCovered())
		if k := p.GetExposedCount(); k > 0 {
			names := p.GetExposed()
			more := ""
			if len(names) > 10 || int(k) > len(names) {
				names = names[:min(10, len(names))]
				more = fmt.Sprintf(" and %d more", int(k)-len(names))
			}
			fmt.Fprintf(out, "%d should have one and have none: %s%s. Add a host, or see tandem rebalance --plan.\n", k, printable(strings.Join(names, ", ")), more)
		}
	}
	for _, part := range []struct {
		n    int
		show func(*v1.PolicyResponse) error
	}{{len(p.GetPools()), a.printPools}, {len(p.GetQuotas()), a.printQuotas}} {
		if part.n == 0 {
			continue
		}
		fmt.Fprintln(out)
		if err := part.show(p); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) printPools(p *v1.PolicyResponse) error {
	if a.format == "json" {
		return printAll(a, p.GetPools())
	}
	var rows [][]string
	for _, u := range p.GetPools() {
		x := u.GetPool()
		rows = append(rows, []string{x.GetPath(), bound(x.GetReservation()), bound(x.GetLimit()), fmt.Sprint(cmp.Or(x.GetShares(), 1000)), sizeText(u.GetUsed()), fmt.Sprint(u.GetContainers())})
	}
	return a.table("POOL|RESERVED|LIMIT|SHARES|USED|CONTAINERS", rows)
}

func (a *app) printQuotas(p *v1.PolicyResponse) error {
	if a.format == "json" {
		return printAll(a, p.GetQuotas())
	}
	of := func(used, most int32) string {
		if most == 0 {
			return fmt.Sprint(used)
		}
		return fmt.Sprintf("%d of %d", used, most)
	}
	var rows [][]string
	for _, u := range p.GetQuotas() {
		q := u.GetQuota()
		rows = append(rows, []string{q.GetProject(), sizeText(u.GetUsed()), bound(q.GetReserved()), of(u.GetContainers(), q.GetContainers()), of(u.GetMachines(), q.GetMachines())})
	}
	return a.table("PROJECT|RESERVED|AT MOST|CONTAINERS|MACHINES", rows)
}

// bound is a size of which a dimension of 0 bounds nothing.
func bound(s *v1.Size) string {
	if s.GetCpuMilli() == 0 && s.GetMemoryBytes() == 0 {
		return "-"
	}
	switch {
	case s.GetCpuMilli() == 0:
		return bytesText(s.GetMemoryBytes())
	case s.GetMemoryBytes() == 0:
		return cpuText(s.GetCpuMilli())
	}
	return sizeText(s)
}
