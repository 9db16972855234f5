// Package e2e runs Tandem as a user does: the real binary, real machines, real
// containers, in namespaces of their own, so that the tests touch nothing of the
// computer that they run on and leave nothing behind.
//
// Build first (make guest); TANDEM_LIB_DIR names the directory with tandem, runc
// and the guest image, ../../bin by default.
package e2e
