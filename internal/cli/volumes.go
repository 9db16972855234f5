package cli

import (
	"fmt"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
)

func (a *app) volume() *cobra.Command {
	ls := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List volumes", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		res, err := api.volumes().List(cmd.Context(), connect.NewRequest(&v1.ListVolumesRequest{Project: a.project}))
		if err != nil {
			return err
		}
		if a.format == "json" {
			return printAll(a, res.Msg.GetVolumes())
		}
		pl, err := a.places(cmd.Context())
		if err != nil {
			return err
		}
		var rows [][]string
		for _, v := range res.Msg.GetVolumes() {
			host := "-"
			if v.GetHostId() != "" {
				host = pl.host(v.GetHostId())
			}
			rows = append(rows, []string{v.GetMeta().GetName(), v.GetMeta().GetProject(), host, bytesText(v.GetStatus().GetUsedBytes()), bytesText(v.GetSizeBytes())})
		}
		return a.table("NAME|PROJECT|HOST|USED|SIZE", rows)
	}}
	var project, size string
	create := &cobra.Command{Use: "create NAME", Short: "Make a volume", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		req := &v1.CreateVolumeRequest{Name: args[0], Project: project}
		if size != "" {
			if req.SizeBytes, err = resource.ParseMemory(size); err != nil {
				return usageError("--size: %v", err)
			}
		}
		res, err := api.volumes().Create(cmd.Context(), connect.NewRequest(req))
		if err != nil {
			return err
		}
		fmt.Fprintln(a.env.Stdout, res.Msg.GetMeta().GetName())
		return nil
	}}
	create.Flags().StringVar(&size, "size", "", "10g, for instance; space is taken as it is used")
	inspect := &cobra.Command{Use: "inspect NAME", Short: "Everything known of a volume", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		res, err := api.volumes().Inspect(cmd.Context(), connect.NewRequest(&v1.VolumeName{Project: project, Name: args[0]}))
		if err != nil {
			return err
		}
		return a.printOne(res.Msg)
	}}
	rm := &cobra.Command{Use: "rm NAME...", Short: "Remove volumes and their data", Args: cobra.MinimumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		for _, n := range args {
			if _, err := api.volumes().Remove(cmd.Context(), connect.NewRequest(&v1.RemoveVolumeRequest{Volume: &v1.VolumeName{Project: project, Name: n}})); err != nil {
				return err
			}
			fmt.Fprintln(a.env.Stdout, n)
		}
		return nil
	}}
	for _, c := range []*cobra.Command{create, inspect, rm} {
		c.Flags().StringVarP(&project, "project", "p", "default", "project that the volume belongs to")
	}
	return parent("volume", "Volumes: disks that outlive containers", ls, create, inspect, rm)
}

func (a *app) hostCmd() *cobra.Command {
	ls := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List hosts", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		res, err := api.system().Hosts(cmd.Context(), connect.NewRequest(&v1.ListHostsRequest{}))
		if err != nil {
			return err
		}
		if a.format == "json" {
			return printAll(a, res.Msg.GetHosts())
		}
		var rows [][]string
		for _, h := range res.Msg.GetHosts() {
			state := "connected"
			if !h.GetConnected() {
				state = "not connected"
			}
			f := h.GetFacts()
			rows = append(rows, []string{h.GetMeta().GetName(), state, sizeText(f.GetCapacity()), f.GetAccelerator(), f.GetKernel(), f.GetVersion()})
		}
		return a.table("NAME|STATE|CAPACITY|ACCELERATOR|KERNEL|VERSION", rows)
	}}
	return parent("host", "Physical hosts", ls)
}
