// Package compose turns Compose files into one request for the server.
//
//	p, err := compose.Load(ctx, compose.Options{Files: []string{"compose.yaml"}, Env: os.Environ()})
//	if err != nil {
//		return err // every problem at once, each with its service and field
//	}
//	for _, w := range p.Warnings { ... }
//	stream, err := client.Apply(ctx, connect.NewRequest(p.Request))
//
// Files, project name, profiles, .env files, interpolation, extends, include and
// merging follow Compose itself (compose-go reads the files). What this package
// adds is the decision about every field of the specification: it is taken over,
// or it is harmless and gives a warning, or it is refused by name. Nothing is
// ignored silently; the table is in fields.go, printed in docs/architecture/compose.md,
// and a test fails when the specification gains a field that nobody decided on.
//
// Errors are errdefs.ErrInvalidArgument (with *Error holding the single problems)
// and errdefs.ErrNotFound when there is no file to read. Only files that the
// Compose files name are read; nothing is executed.
package compose
