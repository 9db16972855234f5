// Package agent is the host agent: it makes one host what its server wants it
// to be, and tells the server what it sees.
//
// The server hands over a HostSpec (machines, containers, volumes, networks,
// ports, names). The agent writes it to disk before it answers, and from then
// on works on it alone: when the server is away, after its own restart, after a
// kill -9 at any instruction. Machines and containers never depend on the
// agent's life; a new process finds them again and goes on.
//
// Inside, one goroutine (an actor) supervises each machine and each container.
// An actor has an intent (the assignment, nil when it shall be gone), a small
// record on disk (what was done last), and observations (from the hypervisor,
// from the runtime). Its step function compares the three and does what is
// missing; it is called again when any of them changes, and every call it makes
// is idempotent. Actors reach each other only through kernel, which is "the
// place where containers run": a machine's guest, or the host itself for metal.
//
//	a, err := agent.New(agent.Options{StateDir: dir, Driver: drv, ...})
//	...
//	err = a.Run(ctx, dialServer, token)   // until ctx ends; workloads go on
//
// Everything that comes from a guest is hostile: calls have deadlines, messages
// a size limit, strings are cut, unknown ids are ignored.
//
// docs/architecture/agent.md tells the whole story on one page.
package agent
