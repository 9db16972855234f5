package clock_test

import (
	"testing"
	"time"

	"tandem/internal/clock"
)

func TestFake(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	c := clock.NewFake(begin)
	late, soon, now := c.After(3*time.Second), c.After(time.Second), c.After(0)
	if at := <-now; !at.Equal(begin) {
		t.Error(at)
	}
	if c.Advance(time.Second - 1); len(soon)+len(late) != 0 || c.Waiting() != 2 {
		t.Error("too early", c.Waiting())
	}
	c.Advance(1)
	if at := <-soon; !at.Equal(begin.Add(time.Second)) || len(late) != 0 {
		t.Error(at)
	}
	if c.Advance(time.Minute); len(late) != 1 || c.Waiting() != 0 || !c.Now().Equal(begin.Add(61*time.Second)) {
		t.Error(c.Now(), c.Waiting())
	}
	if c.Advance(-time.Hour); !c.Now().Equal(begin.Add(61 * time.Second)) {
		t.Error("it went back to", c.Now())
	}
}

func TestSystem(t *testing.T) {
	var c clock.System
	before := time.Now()
	<-c.After(time.Millisecond)
	if c.Now().Sub(before) < time.Millisecond {
		t.Error(c.Now().Sub(before))
	}
}
