package guest

import (
	"math"
	"runtime/debug"
	"time"
)

const (
	// busyMemory is what the agent may have in all, bytes, while it collects no
	// garbage before it must.
	busyMemory = 24 << 20
	// busyTime is how long after its configuration a guest has its first containers
	// to start.
	busyTime = 20 * time.Second
)

// collectLate lets this process collect garbage only when it comes to
// busyMemory: while a guest starts, somebody waits for it, and each collection
// would take a part of its processor.
func collectLate() {
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(busyMemory)
}

// collectSoon keeps this process small again, and gives back what it has too much.
func collectSoon() {
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(math.MaxInt64)
	debug.FreeOSMemory()
}
