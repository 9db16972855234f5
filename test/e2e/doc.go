// Package e2e runs Tandem as a user does: the real binary, real machines, real
// containers, on hosts made by package host. Each test is one promise.
package e2e
