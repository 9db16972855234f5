// Command tandem is the user's command, the server, the host agent, the metal
// monitor and the name server in one binary. What it does is in internal/; here it is wired.
//
//	tandem serve                    the server, with this host's agent in it
//	tandem agent                    an agent alone, beside a server that has none
//	tandem guest build              the kernel and initramfs that machines boot
//	tandem reset                    remove all that Tandem made on this host
//	tandem up, run, ps, logs ...    what users type; see package cli
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/cli"
	"tandem/internal/doctor"
	"tandem/internal/hypervisor/kvmprobe"
	"tandem/internal/runtime/initproc"

	"github.com/spf13/cobra"
)

// version is set by the build.
var version = "dev"

func main() {
	kvmprobe.MaybeChild()
	initproc.Main()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	env := cli.Env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Version: version,
		Extra: []*cobra.Command{serveCommand(), agentCommand(), monitorCommand(), namesCommand(), guestCommand(), resetCommand()},
		State: []*cobra.Command{restoreCommand()},
		Doctor: func(ctx context.Context) []*v1.Finding {
			return doctor.Check(ctx, doctorOptions(&dirs{state: defaultStateDir}))
		}}
	os.Exit(cli.Run(ctx, env, os.Args[1:]))
}
