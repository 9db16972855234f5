package monitor

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"tandem/internal/runtime/jsonlog"
)

// adopt takes over what an earlier monitor left.
func (s *server) adopt() {
	es, err := os.ReadDir(s.o.Dir)
	if err != nil {
		s.log.Error("read the monitor's state", "error", err)
		return
	}
	for _, e := range es {
		if !e.IsDir() || !idPattern.MatchString(e.Name()) {
			continue
		}
		c, err := s.container(e.Name(), true)
		if err != nil {
			continue
		}
		if err := c.adopt(); err != nil {
			s.log.Error("take a container over", "container", c.id, "error", err)
		}
	}
}

func (c *container) adopt() error {
	b, err := os.ReadFile(filepath.Join(c.dir, fileStart))
	if err == nil {
		err = json.Unmarshal(b, &c.req)
	}
	if err != nil || c.req.ID != c.id { // a start that never began
		c.s.mu.Lock()
		delete(c.s.ctrs, c.id)
		c.s.mu.Unlock()
		return os.RemoveAll(c.dir)
	}
	if b, err := os.ReadFile(filepath.Join(c.dir, fileExit)); err == nil {
		var st Status
		if json.Unmarshal(b, &st) == nil && st.ID == c.id {
			c.st = st
			return nil
		}
	}
	p, err := readPID(filepath.Join(c.dir, filePID))
	if err != nil || !alive(p.pid) || !c.s.cg.Group(c.req.Cgroup).Has(p.pid) {
		ran := p != nil
		if p != nil {
			p.f.Close()
		}
		st := Status{ID: c.id, Run: c.req.Run, State: Exited, ExitCode: ExitUnknown, Failed: !ran, FinishedAt: c.s.o.Now(),
			Message: "it ended while no monitor watched it: the exit code is not known"}
		if b, err := os.ReadFile(filepath.Join(c.dir, filePID)); err == nil && len(b) > 0 {
			st.Failed = false
		} else {
			st.Message = "the monitor was killed while it started it"
		}
		st.OOMKills = c.s.cg.Group(c.req.Cgroup).OOMKills()
		if err := c.clear(); err != nil {
			return err
		}
		c.st = st
		return writeJSON(filepath.Join(c.dir, fileExit), st)
	}
	logw, err := jsonlog.NewWriter(c.req.LogPath, c.req.LogMaxSize, c.req.LogMaxFiles)
	if err != nil {
		return err
	}
	io := reopenStdio(c.dir, &c.req)
	c.s.log.Info("took a running container over", "container", c.id, "pid", p.pid)
	c.run(p, io, nil, logw, Status{ID: c.id, Run: c.req.Run, State: Running, PID: p.pid, StartedAt: startTime(p.pid, c.s.o.Now())})
	return nil
}

// startTime is when a process began, from the kernel's clock ticks.
func startTime(pid int, fallback time.Time) time.Time {
	st, err := os.Stat("/proc/" + strconv.Itoa(pid))
	if err != nil {
		return fallback
	}
	return st.ModTime()
}

// watchOOM tells of kills in containers that go on living.
func (s *server) watchOOM(ctx context.Context) {
	t := time.NewTicker(2 * time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		s.mu.Lock()
		var all []*container
		for _, c := range s.ctrs {
			all = append(all, c)
		}
		s.mu.Unlock()
		for _, c := range all {
			c.mu.Lock()
			running, group := c.st.State == Running, s.cg.Group(c.req.Cgroup)
			c.mu.Unlock()
			if !running {
				continue
			}
			n := group.OOMKills()
			c.mu.Lock()
			more := c.st.State == Running && n > c.st.OOMKills
			if more {
				c.st.OOMKills = n
			}
			st := c.st
			c.mu.Unlock()
			if more {
				s.publish(st)
			}
		}
	}
}

func readPID(path string) (*process, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("pid file: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return nil, fmt.Errorf("pid file %s: %q is no process: %w", path, b, errdefs.ErrInternal)
	}
	return openProcess(pid)
}
