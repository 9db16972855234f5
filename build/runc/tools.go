//go:build tools

// Package runc pins the OCI runtime that Tandem ships: a module of its own, so
// that runc's dependencies stay out of Tandem's.
package runc

import _ "github.com/opencontainers/runc"
