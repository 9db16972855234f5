package cli

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
	"time"

	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	units "github.com/docker/go-units"
	"github.com/spf13/cobra"
)

func (a *app) recommend() *cobra.Command {
	var apply, undo bool
	c := &cobra.Command{
		Use:   "recommend [SERVICE...]",
		Short: "What services should reserve, from what they were seen to use",
		Long: `Says for each service what one of its containers should reserve: what it used at
most in 95 % of the time of CPU, the most that was ever seen of memory, and a margin
of 15 %. What is a day old counts half. Without a project (-p, or a Compose file here)
all services are listed.

--apply lets the services of the project reserve that, as far as enough was seen of
them; their containers are replaced. It holds until the Compose file asks for other
CPU or memory for the service than now, until down, or until --undo lets the service
reserve again what the file asks for. up --plan says what is used, and why.`,
		Example: `  tandem recommend
  tandem recommend -p shop web --apply
  tandem recommend -p shop web --undo`,
		ValidArgsFunction: a.completeServiceNames,
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := a.api()
			if err != nil {
				return err
			}
			project, err := a.projectName(cmd.Context())
			if err != nil {
				return err
			}
			if project == "" && (apply || undo || len(args) > 0) {
				return usageError("no Compose file here: name the project with -p, or the file with -f")
			}
			res, err := api.system().Recommend(cmd.Context(), connect.NewRequest(&v1.RecommendRequest{Project: project, Services: args, Apply: apply, Undo: undo}))
			if err != nil {
				return err
			}
			list := res.Msg.GetRecommendations()
			if a.format == "json" {
				return printAll(a, list)
			}
			var rows [][]string
			for _, r := range list {
				cpu, memory := "-", "-"
				if r.GetSamples() > 0 {
					cpu = cpuText(r.GetCpuP50Milli()) + " / " + cpuText(r.GetCpuP95Milli())
					memory = bytesText(r.GetMemoryP99Bytes()) + " / " + bytesText(r.GetMemoryMaxBytes())
				}
				rows = append(rows, []string{recordName(r.GetProject(), r.GetService()), amounts(r.GetReserved()), amounts(r.GetRecommended()), cpu, memory,
					strconv.FormatInt(r.GetSamples(), 10), units.HumanDuration(r.GetSpan().AsDuration()), remark(r, undo)})
			}
			if err := a.table("SERVICE|RESERVES|SHOULD RESERVE|CPU P50 / P95|MEMORY P99 / MOST|SAMPLES|OVER|", rows); err != nil {
				return err
			}
			for i, r := range list {
				if i == 0 {
					fmt.Fprintln(a.env.Stdout)
				}
				fmt.Fprintf(a.env.Stdout, "%s: %s\n", printable(recordName(r.GetProject(), r.GetService())), printable(r.GetText()))
			}
			return nil
		},
	}
	c.Flags().BoolVar(&apply, "apply", false, "let the services reserve it")
	c.Flags().BoolVar(&undo, "undo", false, "let the services reserve again what the Compose file asks for")
	c.MarkFlagsMutuallyExclusive("apply", "undo")
	return c
}

// amounts is a size of which parts may be missing.
func amounts(z *v1.Size) string {
	var parts []string
	if n := z.GetCpuMilli(); n > 0 {
		parts = append(parts, cpuText(n))
	}
	if n := z.GetMemoryBytes(); n > 0 {
		parts = append(parts, bytesText(n))
	}
	return cmp.Or(strings.Join(parts, ", "), "-")
}

func remark(r *v1.Recommendation, undo bool) string {
	file := "the Compose file asks for " + amounts(requested(r.GetInForce().GetRequested()))
	switch {
	case r.GetUndone():
		return "undone"
	case undo:
		return "nothing was applied"
	case r.GetApplied():
		return "applied; " + file
	case r.GetInForce() != nil:
		return "applied " + units.HumanDuration(time.Since(r.GetInForce().GetAt().AsTime())) + " ago; " + file
	case !r.GetEnough():
		return "too little seen"
	}
	return ""
}

// requested is what a Compose file asks for: what it reserves, else its limits.
func requested(r *v1.Resources) *v1.Size {
	return &v1.Size{CpuMilli: cmp.Or(r.GetCpuMilliReservation(), r.GetCpuMilliLimit()), MemoryBytes: cmp.Or(r.GetMemoryBytesReservation(), r.GetMemoryBytesLimit())}
}

// completeServiceNames offers the services of the project to the shell.
func (a *app) completeServiceNames(cmd *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
	project, err := a.projectName(cmd.Context())
	if err != nil || project == "" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	api, err := a.api()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	res, err := api.projects().ListServices(cmd.Context(), connect.NewRequest(&v1.ListServicesRequest{Project: project}))
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, s := range res.Msg.GetServices() {
		if n := s.GetMeta().GetName(); strings.HasPrefix(n, word) {
			out = append(out, printable(n))
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}
