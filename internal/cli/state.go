package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func (a *app) state() *cobra.Command {
	ls := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List records that can't be read", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		api, err := a.api()
		if err != nil {
			return err
		}
		res, err := api.state().List(cmd.Context(), connect.NewRequest(&v1.ListStateRequest{}))
		if err != nil {
			return err
		}
		if a.format == "json" {
			return printAll(a, res.Msg.GetUnreadable())
		}
		if res.Msg.GetFull() {
			fmt.Fprintf(a.env.Stderr, "The disk of %s is full: nothing new is taken until there is space.\n", printable(res.Msg.GetDirectory()))
		}
		var rows [][]string
		for _, r := range res.Msg.GetUnreadable() {
			older := "no"
			if r.GetOlderCopy() {
				older = "yes"
			}
			rows = append(rows, []string{r.GetKind(), recordName(r.GetProject(), r.GetName()), older, r.GetError()})
		}
		return a.table("KIND|NAME|OLDER COPY|ERROR", rows)
	}}
	var yes bool
	purge := &cobra.Command{Use: "purge KIND NAME", Short: "Remove a record that can't be read", Args: cobra.ExactArgs(2),
		Long: `Removes a record that can't be read: the way out when no backup has it.
What the record stands for is forgotten: a container is stopped and removed by its
host; of a volume nothing knows any more, its data stays where it is.

  tandem state ls
  tandem state purge container shop/web-1 --yes`,
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &v1.PurgeStateRequest{Kind: args[0], Name: args[1]}
			if p, n, ok := strings.Cut(args[1], "/"); ok {
				req.Project, req.Name = p, n
			}
			if !yes {
				return fmt.Errorf("this forgets %s %s for good; say --yes: %w", args[0], args[1], errdefs.ErrFailedPrecondition)
			}
			api, err := a.api()
			if err != nil {
				return err
			}
			if _, err := api.state().Purge(cmd.Context(), connect.NewRequest(req)); err != nil {
				return err
			}
			fmt.Fprintln(a.env.Stdout, args[1])
			return nil
		}}
	purge.Flags().BoolVar(&yes, "yes", false, "really")
	backup := &cobra.Command{Use: "backup FILE", Short: "Write all of the state into a file, while it is used", Args: cobra.ExactArgs(1),
		Long: `Writes what the server knows into one file, as of one moment, with the key of the
secrets in it: keep the file as secret as those. Images' and volumes' data are not in
it. tandem state restore makes a new state of it.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := a.api()
			if err != nil {
				return err
			}
			n, err := backupTo(cmd.Context(), api, args[0])
			if err != nil {
				return err
			}
			fmt.Fprintf(a.env.Stdout, "%s: %s\n", args[0], bytesText(n))
			return nil
		}}
	c := parent("state", "The server's own state: backups, records that can't be read", ls, purge, backup)
	c.AddCommand(a.env.State...)
	return c
}

func recordName(project, name string) string {
	if project == "" {
		return name
	}
	return project + "/" + name
}

// backupTo writes a backup into a file that only its owner may read: whole, or not
// at all.
func backupTo(ctx context.Context, api *client, file string) (n int64, err error) {
	st, err := api.state().Backup(ctx, connect.NewRequest(&v1.BackupStateRequest{}))
	if err != nil {
		return 0, err
	}
	defer st.Close()
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*") // 0600
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	for st.Receive() {
		k, err := f.Write(st.Msg().GetData())
		n += int64(k)
		if err != nil {
			return n, errors.Join(err, f.Close())
		}
	}
	if err := errors.Join(st.Err(), f.Sync(), f.Close()); err != nil {
		return n, err
	}
	return n, os.Rename(f.Name(), file)
}
