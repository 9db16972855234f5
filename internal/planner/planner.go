package planner

// Question is what is asked; exactly one field is set.
type Question struct {
	// Place asks where to put these containers (IDs known to the state, not placed).
	Place []string
	// Trim asks which machines to shrink or stop because they are larger than
	// what they hold; idle names machines that have been empty for long enough
	// to be stopped.
	Trim *Trim
}

// Trim bounds what a Trim question may do.
type Trim struct {
	Idle   []string // empty machines that may stop now
	Shrink bool     // shrink machines to what they hold (down to base)
}
