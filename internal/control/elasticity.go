package control

import (
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// Elasticity is how machines follow their containers. Zero values take the defaults
// that are named.
type Elasticity struct {
	// IdleStop is how long a machine stays empty before it is stopped (default 60 s).
	IdleStop time.Duration
	// ShrinkDelay is how long one stays larger than needed (default 3 s). A machine that
	// had to grow soon after it was shrunk waits longer the next time, up to a hundred
	// times as long.
	ShrinkDelay time.Duration
	// FoldDelay is how long machines must have been as they are before one is folded
	// into others (default 5 min; negative: never), FoldsPerHour how many containers
	// may be moved for that in an hour (default 30).
	FoldDelay    time.Duration
	FoldsPerHour int
	// RestartDelay is how long a host may be away before what may run elsewhere is
	// started there (default 5 min; negative: never).
	RestartDelay time.Duration
}

// Validate says what of it can't be meant (InvalidArgument).
func (e Elasticity) Validate() error {
	switch {
	case e.IdleStop < 0:
		return fmt.Errorf("an empty machine can't stop after %s: %w", e.IdleStop, errdefs.ErrInvalidArgument)
	case e.ShrinkDelay < 0:
		return fmt.Errorf("a machine can't shrink after %s: %w", e.ShrinkDelay, errdefs.ErrInvalidArgument)
	case e.FoldsPerHour < 0:
		return fmt.Errorf("there can't be %d moves an hour; a negative delay switches folding off: %w", e.FoldsPerHour, errdefs.ErrInvalidArgument)
	case e.FoldDelay > 0 && e.FoldDelay < time.Second, e.RestartDelay > 0 && e.RestartDelay < time.Second:
		return fmt.Errorf("folds after %s and restarts after %s: at least 1 s, or negative for never: %w", e.FoldDelay, e.RestartDelay, errdefs.ErrInvalidArgument)
	}
	return nil
}
