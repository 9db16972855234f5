// Package host gives tests and benchmarks a server of their own: namespaces with
// Tandem's real binary in them, which touch nothing of the computer that they run
// on and leave nothing behind.
//
//	func TestMain(m *testing.M) { host.MaybeInit(); os.Exit(m.Run()) }
//
//	h := host.New(t)
//	h.Launch()                      // tandem serve
//	h.Images()                      // busybox and httpd
//	h.Tandem("run", "--rm", "busybox", "true")
//	h.Kill9(); h.Launch()           // nothing of what runs has stopped
//
// Build first (make guest); TANDEM_LIB_DIR names the directory with tandem, runc
// and the guest image, bin/ at the root of the tree by default.
package host
