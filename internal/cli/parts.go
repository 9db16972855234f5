package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/distribution/reference"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func parent(use, short string, children ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(children...)
	return c
}

func parseSize(cpus, memory string) (*v1.Size, error) {
	if cpus == "" && memory == "" {
		return nil, nil
	}
	s := &v1.Size{}
	var err error
	if cpus != "" {
		if s.CpuMilli, err = resource.ParseCPU(cpus); err != nil {
			return nil, usageError("CPUs: %v", err)
		}
	}
	if memory != "" {
		if s.MemoryBytes, err = resource.ParseMemory(memory); err != nil {
			return nil, usageError("memory: %v", err)
		}
	}
	return s, nil
}

// ---- machines

func (a *app) machine() *cobra.Command {
	ls := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List machines", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		res, err := api.machines.List(cmd.Context(), connect.NewRequest(&v1.ListMachinesRequest{Project: a.project}))
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
		cs, err := api.containers.List(cmd.Context(), connect.NewRequest(&v1.ListContainersRequest{All: true}))
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
		res, err := api.machines.Inspect(cmd.Context(), connect.NewRequest(r))
		return msgOf(res), err
	})
	start := call("start", "Start a stopped machine", func(cmd *cobra.Command, api *client, r *v1.MachineRequest) (*v1.Machine, error) {
		res, err := api.machines.Start(cmd.Context(), connect.NewRequest(r))
		return msgOf(res), err
	})
	stop := call("stop", "Stop a machine and keep it", func(cmd *cobra.Command, api *client, r *v1.MachineRequest) (*v1.Machine, error) {
		res, err := api.machines.Stop(cmd.Context(), connect.NewRequest(r))
		return msgOf(res), err
	})
	rm := call("rm", "Remove a machine", func(cmd *cobra.Command, api *client, r *v1.MachineRequest) (*v1.Machine, error) {
		_, err := api.machines.Remove(cmd.Context(), connect.NewRequest(r))
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
		res, err := api.machines.Create(cmd.Context(), connect.NewRequest(req))
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
		res, err := api.machines.Resize(cmd.Context(), connect.NewRequest(&v1.ResizeMachineRequest{Machine: args[0], Size: size, Wait: true}))
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

func (a *app) machineConsole() *cobra.Command {
	return &cobra.Command{Use: "console MACHINE", Short: "A machine's serial console (Ctrl-] leaves)", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		st := api.machines.Console(cmd.Context())
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

// ---- images

func (a *app) image() *cobra.Command {
	return parent("image", "Images", a.imageLs(), a.imagePull(), a.imageLoad(false), a.imageLoad(true), a.imageSave(), a.imageRm(), a.imageTag(), a.imagePrune())
}

func (a *app) imageLs() *cobra.Command {
	return &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List images", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		res, err := api.images.List(cmd.Context(), connect.NewRequest(&v1.ListImagesRequest{}))
		if err != nil {
			return err
		}
		if a.format == "json" {
			return printAll(a, res.Msg.GetImages())
		}
		var rows [][]string
		for _, i := range res.Msg.GetImages() {
			names := i.GetNames()
			if len(names) == 0 {
				names = []string{"<none>"}
			}
			for _, n := range names {
				rows = append(rows, []string{familiar(n), shortID(i.GetId()), ago(i.GetCreatedAt(), time.Now()) + " ago", bytesText(i.GetSizeBytes()), map[bool]string{true: "yes", false: ""}[i.GetInUse()]})
			}
		}
		return a.table("NAME|ID|CREATED|SIZE|IN USE", rows)
	}}
}

// familiar is a reference as people write it: without the default registry.
func familiar(s string) string {
	if n, err := reference.ParseNormalizedNamed(s); err == nil {
		return reference.FamiliarString(n)
	}
	return s
}

func (a *app) imagePull() *cobra.Command {
	var platform string
	c := &cobra.Command{Use: "pull IMAGE...", Short: "Pull images from their registries", Args: cobra.MinimumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		for _, ref := range args {
			st, err := api.images.Pull(cmd.Context(), connect.NewRequest(&v1.PullImageRequest{Ref: ref, Platform: platform}))
			if err != nil {
				return err
			}
			if err := a.follow(st); err != nil {
				return err
			}
			fmt.Fprintln(a.env.Stdout, ref)
		}
		return nil
	}}
	c.Flags().StringVar(&platform, "platform", "", "os/arch, this host's by default")
	return c
}

func (a *app) imageLoad(isImport bool) *cobra.Command {
	var input string
	var changes []string
	c := &cobra.Command{Use: "load", Short: "Load images from a docker or OCI archive", Args: cobra.NoArgs}
	if isImport {
		c = &cobra.Command{Use: "import FILE|- NAME", Short: "Make an image of a root file-system tar", Args: cobra.ExactArgs(2)}
		c.Flags().StringArrayVarP(&changes, "change", "c", nil, "Dockerfile instruction: CMD, ENTRYPOINT, ENV, USER, ...")
	} else {
		c.Flags().StringVarP(&input, "input", "i", "-", "archive to read")
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		o := &v1.LoadOptions{Import: isImport, Changes: changes}
		if isImport {
			input, o.Ref = args[0], args[1]
		}
		in := a.env.Stdin
		if input != "-" {
			f, err := os.Open(input)
			if err != nil {
				return err
			}
			defer f.Close()
			in = f
		}
		api, err := a.api()
		if err != nil {
			return err
		}
		st := api.images.Load(cmd.Context())
		sent := make(chan error, 1)
		go func() { sent <- sendChunks(st, o, in) }()
		pr := newProgress(a.env.Stderr)
		for {
			m, err := st.Receive()
			if errors.Is(err, io.EOF) {
				return <-sent
			}
			if err != nil {
				return err
			}
			pr.step(m.GetProgress())
			for _, i := range m.GetImages() {
				if a.format == "json" {
					if err := a.printOne(i); err != nil {
						return err
					}
					continue
				}
				for _, n := range i.GetNames() {
					fmt.Fprintln(a.env.Stdout, familiar(n))
				}
				if len(i.GetNames()) == 0 {
					fmt.Fprintln(a.env.Stdout, i.GetId())
				}
			}
		}
	}
	return c
}

func sendChunks(st *connect.BidiStreamForClient[v1.ImageChunk, v1.LoadProgress], o *v1.LoadOptions, r io.Reader) error {
	if err := st.Send(&v1.ImageChunk{Kind: &v1.ImageChunk_Options{Options: o}}); err != nil {
		return ignoreEOF(err)
	}
	buf := make([]byte, 1<<20)
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			if serr := st.Send(&v1.ImageChunk{Kind: &v1.ImageChunk_Data{Data: buf[:n]}}); serr != nil {
				return ignoreEOF(serr)
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return st.CloseRequest()
		}
		if err != nil {
			st.CloseRequest()
			return fmt.Errorf("reading the archive: %w", err)
		}
	}
}

// ignoreEOF: the server ended the stream; what it had to say comes by Receive.
func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (a *app) imageSave() *cobra.Command {
	var output, archive string
	c := &cobra.Command{Use: "save IMAGE...", Short: "Write images to an archive", Args: cobra.MinimumNArgs(1), RunE: func(cmd *cobra.Command, args []string) (err error) {
		out := a.env.Stdout
		if output != "" && output != "-" {
			f, err := os.CreateTemp(dirOf(output), ".save-*")
			if err != nil {
				return err
			}
			defer func() {
				f.Close()
				os.Remove(f.Name())
			}()
			out = f
			defer func() {
				if err == nil {
					err = errors.Join(f.Sync(), os.Rename(f.Name(), output))
				}
			}()
		} else if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			return usageError("an archive is no good on a terminal: use -o FILE")
		}
		api, err := a.api()
		if err != nil {
			return err
		}
		st, err := api.images.Save(cmd.Context(), connect.NewRequest(&v1.SaveImageRequest{Refs: args, Format: archive}))
		if err != nil {
			return err
		}
		defer st.Close()
		for st.Receive() {
			if _, err := out.Write(st.Msg().GetData()); err != nil {
				return err
			}
		}
		return st.Err()
	}}
	c.Flags().StringVarP(&output, "output", "o", "", "file to write")
	c.Flags().StringVar(&archive, "archive", "docker", "docker or oci")
	return c
}

func dirOf(p string) string {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i+1]
	}
	return "."
}

func (a *app) imageRm() *cobra.Command {
	var force bool
	c := &cobra.Command{Use: "rm IMAGE...", Short: "Remove images", Args: cobra.MinimumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		for _, ref := range args {
			res, err := api.images.Remove(cmd.Context(), connect.NewRequest(&v1.RemoveImageRequest{Ref: ref, Force: force}))
			if err != nil {
				return err
			}
			for _, u := range res.Msg.GetUntagged() {
				fmt.Fprintln(a.env.Stdout, "Untagged:", familiar(u))
			}
			for _, d := range res.Msg.GetDeleted() {
				fmt.Fprintln(a.env.Stdout, "Deleted:", d)
			}
		}
		return nil
	}}
	c.Flags().BoolVarP(&force, "force", "f", false, "even where a container uses it")
	return c
}

func (a *app) imageTag() *cobra.Command {
	return &cobra.Command{Use: "tag IMAGE NAME", Short: "Give an image a further name", Args: cobra.ExactArgs(2), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		_, err = api.images.Tag(cmd.Context(), connect.NewRequest(&v1.AgentTagImageRequest{Source: args[0], Target: args[1]}))
		return err
	}}
}

func (a *app) imagePrune() *cobra.Command {
	var all bool
	c := &cobra.Command{Use: "prune", Short: "Remove images that nothing uses", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		res, err := api.images.Prune(cmd.Context(), connect.NewRequest(&v1.AgentPruneImagesRequest{All: all}))
		if err != nil {
			return err
		}
		for _, d := range res.Msg.GetDeleted() {
			fmt.Fprintln(a.env.Stdout, d)
		}
		fmt.Fprintln(a.env.Stderr, "Reclaimed "+bytesText(res.Msg.GetReclaimedBytes()))
		return nil
	}}
	c.Flags().BoolVarP(&all, "all", "a", false, "named ones too, when no container uses them")
	return c
}
