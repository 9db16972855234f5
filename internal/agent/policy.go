package agent

import (
	"time"

	v1 "tandem/api/tandem/v1"
)

// exitInfo is how a container's run ended.
type exitInfo struct {
	Code int32
	Ran  time.Duration // how long it ran
}

// shouldRestart is Docker's restart policy: count is how often it was restarted
// by policy since a user last started it.
func shouldRestart(p *v1.RestartPolicy, e exitInfo, count int32) bool {
	switch p.GetName() {
	case "always", "unless-stopped":
		return true
	case "on-failure":
		return e.Code != 0 && (p.MaxRetries <= 0 || count < p.MaxRetries)
	}
	return false
}

// backoff doubles from first to most; a zero value begins anew.
type backoff struct {
	Last time.Duration `json:"last,omitempty"`
}

func (b *backoff) next(first, most time.Duration) time.Duration {
	if b.Last <= 0 {
		b.Last = first
	} else {
		b.Last = min(2*b.Last, most)
	}
	return b.Last
}

func (b *backoff) reset() { b.Last = 0 }
