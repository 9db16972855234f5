// Package debian runs Tandem where its users do: on Debian 12 with systemd as PID 1
// and control groups of version 2 alone, installed by `make install`, in a virtual
// machine of its own that QEMU translates. What is checked there is in the script
// check; its lines become this test's.
package debian
