// Package layout says where things are in a container machine's file system: the
// words that the builder of the guest image (guestimage) and the guest share. It
// holds paths only and imports nothing, so that both may stand on it.
package layout

// Paths in the initramfs.
const (
	// Init is tandem-guest: PID 1, agent and modprobe.
	Init = "/init"
	// Modprobe is the link by which the kernel calls it to load a module.
	Modprobe = "/sbin/modprobe"
	// Runc is the OCI runtime.
	Runc = "/bin/runc"
	// ModuleDir holds NAME.ko and the lists below.
	ModuleDir = "/lib/modules"
	// BootList names the modules that the agent's port needs; LateList those that
	// load once the agent runs. In load order, one a line.
	BootList = ModuleDir + "/boot"
	LateList = ModuleDir + "/late"
	// ModuleIndex has a line per module, "name dep dep ...", each after those that
	// it depends on, and then a line "alias pattern name" per alias.
	ModuleIndex = ModuleDir + "/index"
)

// Paths that the guest makes.
const (
	// RunDir is on a tmpfs: it lives as long as the boot.
	RunDir = "/run/tandem"
	// StateDir holds writable layers and logs: the scratch disk, once configured.
	StateDir = "/var/lib/tandem"
	// MonitorSocket is where the container monitor in PID 1 listens.
	MonitorSocket = RunDir + "/monitor.sock"
	// MonitorDir is the monitor's state.
	MonitorDir = RunDir + "/monitor"
	// IdentityFile is what Configure gave the guest; it outlives the agent process.
	IdentityFile = RunDir + "/identity.json"
	// LateDone appears when the modules of LateList are loaded.
	LateDone = RunDir + "/modules-loaded"
	// GuestCgroup is PID 1's and the agent's cgroup, with memory of their own.
	GuestCgroup = "/sys/fs/cgroup/tandem-guest"
)
