// Package guest is tandem-guest: the one program of a container machine. It is
// PID 1, the agent that the host talks to, the kernel's modprobe, and the init
// of containers that ask for one:
//
//	guest.Main(os.Args)
//
// PID 1 (Init) is small and does not restart: it mounts, loads modules, brings
// hot-added CPUs online, hosts the container monitor (which owns standard
// streams, logs and exit codes), starts the agent as a child and starts it again
// whenever it ends. The agent serves GuestService and RuntimeService over the
// agent channel. It may be killed at any time: containers go on, and the next
// agent finds them, and the identity that Configure gave, again.
//
// All that comes over the channel is from the host and trusted; all that comes
// from containers is not. The agent needs nothing of the scratch disk to answer,
// so a full one stops containers only.
package guest

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"tandem/internal/guest/layout"
	"tandem/internal/runtime/initproc"
)

// Version is what Hello answers; the linker may set it.
var Version = "dev"

// Main is the program: what it does depends on how it was called.
func Main(args []string) {
	initproc.Main() // ends here in a container that wants an init
	switch {
	case filepath.Base(args[0]) == filepath.Base(layout.Modprobe):
		os.Exit(Modprobe(args[1:]))
	case len(args) > 1 && args[1] == "agent":
		if err := RunAgent(); err != nil {
			slog.Error("agent ended", "error", err)
			os.Exit(1)
		}
	case os.Getpid() == 1:
		Init()
	default:
		fmt.Fprintln(os.Stderr, "tandem-guest is the first program of a container machine; it does nothing elsewhere")
		os.Exit(2)
	}
}
