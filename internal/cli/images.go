package cli

import (
	"errors"
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

func (a *app) image() *cobra.Command {
	return parent("image", "Images", a.imageLs(), a.imagePull(), a.imageLoad(false), a.imageLoad(true), a.imageSave(), a.imageRm(), a.imageTag(), a.imagePrune())
}

func (a *app) imageLs() *cobra.Command {
	return &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List images", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		res, err := api.images().List(cmd.Context(), connect.NewRequest(&v1.ListImagesRequest{}))
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

// familiar is a full reference as people write it: without the default registry.
// (The package that the images' store has for this costs the command a millisecond
// at each start.)
func familiar(s string) string {
	rest, ok := strings.CutPrefix(s, "docker.io/")
	if !ok {
		return s
	}
	if short, ok := strings.CutPrefix(rest, "library/"); ok && !strings.Contains(short, "/") {
		return short
	}
	return rest
}

func (a *app) imagePull() *cobra.Command {
	var platform string
	c := &cobra.Command{Use: "pull IMAGE...", Short: "Pull images from their registries", Args: cobra.MinimumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		for _, ref := range args {
			st, err := api.images().Pull(cmd.Context(), connect.NewRequest(&v1.PullImageRequest{Ref: ref, Platform: platform}))
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
	var input, on string
	var changes []string
	c := &cobra.Command{Use: "load", Short: "Load images from a docker or OCI archive", Args: cobra.NoArgs}
	if isImport {
		c = &cobra.Command{Use: "import FILE|- NAME", Short: "Make an image of a root file-system tar", Args: cobra.ExactArgs(2)}
		c.Flags().StringArrayVarP(&changes, "change", "c", nil, "Dockerfile instruction: CMD, ENTRYPOINT, ENV, USER, ...")
	} else {
		c.Flags().StringVarP(&input, "input", "i", "-", "archive to read")
	}
	c.Flags().StringVar(&on, "on", "", "host that takes it (default: all that are connected)")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		o := &v1.LoadOptions{Import: isImport, Changes: changes, Host: on}
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
		st := api.images().Load(cmd.Context())
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
		st, err := api.images().Save(cmd.Context(), connect.NewRequest(&v1.SaveImageRequest{Refs: args, Format: archive}))
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
			res, err := api.images().Remove(cmd.Context(), connect.NewRequest(&v1.RemoveImageRequest{Ref: ref, Force: force}))
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
		_, err = api.images().Tag(cmd.Context(), connect.NewRequest(&v1.AgentTagImageRequest{Source: args[0], Target: args[1]}))
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
		res, err := api.images().Prune(cmd.Context(), connect.NewRequest(&v1.AgentPruneImagesRequest{All: all}))
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
