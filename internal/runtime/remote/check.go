package remote

import (
	"fmt"
	"math"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime/jsonlog"
)

// Bounds of what a guest may say.
const (
	maxText       = 4096
	maxContainers = 10_000
	maxProcesses  = 4096
	maxLabels     = 1024
)

var idPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)

func bad(format string, a ...any) error {
	return fmt.Errorf("answer of the guest: "+format+": %w", append(a, errdefs.ErrDataLoss)...)
}

// clean makes a text fit to be printed.
func clean(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.ToValidUTF8(s, "?")
}

func checkText(what, s string, limit int) error {
	if len(s) > limit || !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
		return bad("%s of %d bytes", what, len(s))
	}
	return nil
}

// latest bounds what may pass as a time.
var latest = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)

func checkTime(what string, t *timestamppb.Timestamp) error {
	if t == nil {
		return nil
	}
	if t.CheckValid() != nil || t.AsTime().After(latest) || t.AsTime().Before(time.Unix(0, 0)) {
		return bad("%s %v", what, t)
	}
	return nil
}

// checkStatus checks one container's status; want is its id, "" for any.
func checkStatus(s *v1.RuntimeStatus, want string) error {
	switch {
	case s == nil:
		return bad("no status")
	case !idPattern.MatchString(s.Id) || want != "" && s.Id != want:
		return bad("status of %.80q", s.Id)
	case s.ExitCode < 0 || s.ExitCode > 255:
		return bad("exit code %d", s.ExitCode)
	case s.Pid < 0 || s.Pid > math.MaxInt32:
		return bad("process %d", s.Pid)
	case len(s.Labels) > maxLabels:
		return bad("%d labels", len(s.Labels))
	}
	switch s.State {
	case v1.ContainerState_CONTAINER_STATE_CREATED, v1.ContainerState_CONTAINER_STATE_RUNNING,
		v1.ContainerState_CONTAINER_STATE_PAUSED, v1.ContainerState_CONTAINER_STATE_EXITED:
	default:
		return bad("state %d", s.State)
	}
	for k, v := range s.Labels {
		if checkText("label", k, maxText) != nil || checkText("label", v, 64<<10) != nil {
			return bad("label of %d bytes", len(k)+len(v))
		}
	}
	for what, t := range map[string]*timestamppb.Timestamp{"creation": s.CreatedAt, "start": s.StartedAt, "end": s.FinishedAt} {
		if err := checkTime(what, t); err != nil {
			return err
		}
	}
	return nil
}

func checkList(l []*v1.RuntimeStatus) error {
	if len(l) > maxContainers {
		return bad("%d containers", len(l))
	}
	seen := make(map[string]bool, len(l))
	for _, s := range l {
		if err := checkStatus(s, ""); err != nil {
			return err
		}
		if seen[s.Id] {
			return bad("container %s twice", s.Id)
		}
		seen[s.Id] = true
	}
	return nil
}

func checkUsage(u *v1.Usage) error {
	if u == nil {
		return bad("no usage")
	}
	for _, n := range []int64{u.MemoryBytes, u.MemoryLimitBytes, u.MemoryCacheBytes, u.Pids} {
		if n < 0 || n > 1<<60 {
			return bad("usage of %d", n)
		}
	}
	for _, f := range []float64{u.CpuPressure, u.MemoryPressure, u.IoPressure} {
		if math.IsNaN(f) || f < 0 || f > 100 {
			return bad("pressure of %v", f)
		}
	}
	return checkTime("time", u.At)
}

func checkTop(ps []*v1.Process) error {
	if len(ps) > maxProcesses {
		return bad("%d processes", len(ps))
	}
	for _, p := range ps {
		if p == nil || p.Pid <= 0 || p.Ppid < 0 || p.RssBytes < 0 {
			return bad("process %v", p.GetPid())
		}
		for _, s := range []string{p.User, p.Command, p.State} {
			if err := checkText("process", s, maxText); err != nil {
				return err
			}
		}
		if err := checkTime("start", p.StartedAt); err != nil {
			return err
		}
	}
	return nil
}

// maxLine leaves room for what replaces bytes that are no UTF-8.
const maxLine = 3 * jsonlog.MaxLine

func checkEntry(e *v1.LogEntry, id string) error {
	switch {
	case e == nil || e.Stream != "stdout" && e.Stream != "stderr":
		return bad("log stream %.20q", e.GetStream())
	case len(e.Line) > maxLine:
		return bad("log line of %d bytes", len(e.Line))
	case e.ContainerId != id:
		return bad("log entry of %.80q", e.ContainerId)
	}
	if err := checkText("container name", e.ContainerName, maxText); err != nil {
		return err
	}
	return checkTime("log time", e.Time)
}

func checkEvent(ev *v1.RuntimeEvent) error {
	switch ev.GetAction() {
	case "create", "start", "exit", "oom", "pause", "resume", "delete":
	default:
		return bad("event %.40q", ev.GetAction())
	}
	if ev.Id == "" { // checkStatus would take any
		return bad("event of no container")
	}
	if err := checkTime("event time", ev.At); err != nil {
		return err
	}
	return checkStatus(ev.Status, ev.Id)
}
