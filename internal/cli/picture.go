package cli

import (
	"fmt"
	"io"
	"sort"
	"time"

	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
)

// picture draws hosts, machines and containers as a tree.
func (a *app) picture() *cobra.Command {
	return &cobra.Command{
		Use: "picture", Aliases: []string{"tree"}, Short: "Draw host -> machine -> containers", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			api, err := a.api()
			if err != nil {
				return err
			}
			hs, err := api.system().Hosts(cmd.Context(), connect.NewRequest(&v1.ListHostsRequest{}))
			if err != nil {
				return err
			}
			ms, err := api.machines().List(cmd.Context(), connect.NewRequest(&v1.ListMachinesRequest{}))
			if err != nil {
				return err
			}
			cs, err := api.containers().List(cmd.Context(), connect.NewRequest(&v1.ListContainersRequest{All: true}))
			if err != nil {
				return err
			}
			t := tree(hs.Msg.GetHosts(), ms.Msg.GetMachines(), cs.Msg.GetContainers(), time.Now())
			if a.format == "json" {
				return writeJSON(a.env.Stdout, t)
			}
			for _, h := range t {
				fmt.Fprintln(a.env.Stdout, printable(h.Text))
				draw(a.env.Stdout, h.Children, "  ")
			}
			return nil
		},
	}
}

// node is one thing in the picture.
type node struct {
	Kind     string  `json:"kind"`
	Name     string  `json:"name"`
	Text     string  `json:"-"`
	Detail   string  `json:"detail"`
	Children []*node `json:"children,omitempty"`
}

func newNode(kind, name, detail string) *node {
	return &node{Kind: kind, Name: name, Detail: detail, Text: fmt.Sprintf("%-9s %s  %s", kind, name, detail)}
}

// tree puts containers under machines under hosts; what has no place comes last.
func tree(hosts []*v1.Host, machines []*v1.Machine, containers []*v1.Container, now time.Time) []*node {
	byHost, byMachine := map[string]*node{}, map[string]*node{}
	var roots []*node
	for _, h := range hosts {
		f := h.GetFacts()
		n := newNode("host", h.GetMeta().GetName(), fmt.Sprintf("%s, %s", sizeText(f.GetCapacity()), f.GetAccelerator()))
		byHost[h.GetMeta().GetId()] = n
		roots = append(roots, n)
	}
	waiting := newNode("waiting", "", "no place yet")
	for _, m := range machines {
		n := newNode("machine", m.GetMeta().GetName(), fmt.Sprintf("%s, %s, %s, %s", sizeText(m.GetStatus().GetSize()), machineStateText(m), machineOwner(m), startText(m)))
		byMachine[m.GetMeta().GetId()] = n
		if h := byHost[m.GetHostId()]; h != nil {
			h.Children = append(h.Children, n)
		} else {
			waiting.Children = append(waiting.Children, n)
		}
	}
	for _, c := range containers {
		as := c.GetAssignment()
		n := newNode("container", c.GetMeta().GetName(), fmt.Sprintf("%s  %s  %s  %s", c.GetSpec().GetImage(), addressText(as), statusText(c, now), portsText(as.GetPorts())))
		switch {
		case as.GetMachineId() != "" && byMachine[as.GetMachineId()] != nil:
			p := byMachine[as.GetMachineId()]
			p.Children = append(p.Children, n)
		case as.GetHostId() != "" && byHost[as.GetHostId()] != nil:
			byHost[as.GetHostId()].Children = append(byHost[as.GetHostId()].Children, n)
		default:
			waiting.Children = append(waiting.Children, n)
		}
	}
	if len(waiting.Children) > 0 {
		roots = append(roots, waiting)
	}
	for _, r := range roots {
		sortNodes(r)
	}
	return roots
}

func sortNodes(n *node) {
	sort.SliceStable(n.Children, func(i, j int) bool {
		a, b := n.Children[i], n.Children[j]
		if a.Kind != b.Kind {
			return a.Kind > b.Kind // machines before containers
		}
		return a.Name < b.Name
	})
	for _, c := range n.Children {
		sortNodes(c)
	}
}

func draw(w io.Writer, list []*node, indent string) {
	for i, n := range list {
		branch, next := "├─ ", "│  "
		if i == len(list)-1 {
			branch, next = "└─ ", "   "
		}
		fmt.Fprintln(w, indent+branch+printable(n.Text))
		draw(w, n.Children, indent+next)
	}
}
