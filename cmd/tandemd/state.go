package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"tandem/internal/store"

	"github.com/spf13/cobra"
)

// restoreCommand makes a state directory of a backup; no server runs meanwhile.
func restoreCommand() *cobra.Command {
	var d dirs
	c := &cobra.Command{
		Use: "restore FILE", Short: "Make the state of a backup, while no server runs", Args: cobra.ExactArgs(1),
		Long: `Makes the server's state what a backup says, in a state directory that has none.
Start the server afterwards: machines and containers that run and are in the backup go
on; those that were made after it are removed by their hosts, their volumes' data stays.

  tandem state backup /backup/tandem
  systemctl stop tandem && mv /var/lib/tandem/server/server /var/lib/tandem/server/old
  tandem state restore /backup/tandem && systemctl start tandem`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := needRoot("tandem state restore"); err != nil {
				return err
			}
			if err := d.check(); err != nil {
				return err
			}
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			log := slog.New(slog.DiscardHandler)
			if d.verbose {
				log = d.logger()
			}
			dir := filepath.Join(d.state, "server", "server")
			h, err := store.Restore(cmd.Context(), dir, f, log)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "restored the state of %s (cluster %.12s, Tandem %s) to %s; start the server now\n", h.Time.Local().Format(time.DateTime), h.Cluster, h.Version, dir)
			return nil
		},
	}
	d.flags(c, false)
	return c
}
