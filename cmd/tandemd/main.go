// Command tandemd is the server, the host agent, the metal monitor, the name server
// and the whole of the user's command in one binary; users type tandem, which
// becomes it for what it can't do itself. What it does is in internal/; here it is
// wired.
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
	"tandem/internal/compose"
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
		Extra:   []*cobra.Command{serveCommand(), agentCommand(), monitorCommand(), namesCommand(), guestCommand(), resetCommand()},
		State:   []*cobra.Command{restoreCommand()},
		Compose: loadCompose,
		Doctor: func(ctx context.Context) []*v1.Finding {
			return doctor.Check(ctx, doctorOptions(&dirs{state: defaultStateDir}))
		}}
	os.Exit(cli.Run(ctx, env, os.Args[1:]))
}

func loadCompose(ctx context.Context, o cli.ComposeFiles) (*v1.ApplyProjectRequest, []string, error) {
	p, err := compose.Load(ctx, compose.Options{Files: o.Files, WorkingDir: o.WorkingDir, ProjectName: o.ProjectName,
		Profiles: o.Profiles, EnvFiles: o.EnvFiles, Env: os.Environ()})
	if err != nil {
		return nil, nil, err
	}
	return p.Request, p.Warnings, nil
}
