// Command tandem is what users type: it talks to the server itself and starts in a
// few milliseconds.
//
// What needs more (the server and agent, Compose files, the help
// of all commands) it leaves to tandemd, which it becomes:
//
//	tandem run, ps, logs, exec ...  talk to the server; see package cli
//	tandem up, serve, guest build   tandemd with the same arguments
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"tandem/internal/cli"
)

// version is set by the build.
var version = "dev"

func main() {
	env := cli.Env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Version: version, Whole: become}
	if !cli.Alone(env, os.Args[1:]) {
		cli.Exit(env, become())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(cli.Run(ctx, env, os.Args[1:]))
}
