package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	v1 "tandem/api/tandem/v1"

	units "github.com/docker/go-units"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

var jsonOptions = protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}

// jsonOf is a message as the API's JSON, with secrets blanked.
func jsonOf(m proto.Message) (json.RawMessage, error) {
	if c, ok := m.(*v1.Container); ok && len(c.GetSpec().GetFiles()) > 0 {
		c = proto.Clone(c).(*v1.Container)
		for _, f := range c.Spec.Files {
			if f.Secret {
				f.Content = nil
			}
		}
		m = c
	}
	return jsonOptions.Marshal(m)
}

// printOne prints one object as indented JSON.
func (a *app) printOne(m proto.Message) error {
	raw, err := jsonOf(m)
	if err != nil {
		return err
	}
	return writeJSON(a.env.Stdout, raw)
}

// printAll prints an array of objects as indented JSON.
func printAll[M proto.Message](a *app, list []M) error {
	out := make([]json.RawMessage, 0, len(list))
	for _, m := range list {
		raw, err := jsonOf(m)
		if err != nil {
			return err
		}
		out = append(out, raw)
	}
	return writeJSON(a.env.Stdout, out)
}

// writeJSON indents; protojson's own white space is not stable, this is.
func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// table prints rows under a header, aligned.
func (a *app) table(header string, rows [][]string) error {
	w := tabwriter.NewWriter(a.env.Stdout, 2, 4, 3, ' ', 0)
	fmt.Fprintln(w, strings.ReplaceAll(header, "|", "\t"))
	for _, r := range rows {
		for i := range r {
			r[i] = printable(r[i])
		}
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	return w.Flush()
}

// printable takes control characters out of what guests and images wrote, so
// that they can't move a user's cursor.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return ' '
		}
		return r
	}, s)
}

// bytesText is an amount of memory or disk, in powers of 1024.
func bytesText(n int64) string {
	if n <= 0 {
		return "0"
	}
	return units.CustomSize("%.4g %s", float64(n), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"})
}

func cpuText(milli int64) string {
	return strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.2f", float64(milli)/1000), "0"), ".") + " CPU"
}

func sizeText(s *v1.Size) string {
	return cpuText(s.GetCpuMilli()) + ", " + bytesText(s.GetMemoryBytes())
}

// ago is how long something is past, as Docker says it.
func ago(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil || !t.IsValid() || t.AsTime().IsZero() {
		return "-"
	}
	d := now.Sub(t.AsTime())
	if d < 0 {
		d = 0
	}
	return units.HumanDuration(d)
}

func enumText(s, prefix string) string {
	return strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(s, prefix), "_", " "))
}

func isolationText(i v1.Isolation) string {
	if i == v1.Isolation_ISOLATION_UNSPECIFIED {
		i = v1.Isolation_ISOLATION_PROJECT
	}
	return enumText(i.String(), "ISOLATION_")
}

// statusText is a container's state for people.
func statusText(c *v1.Container, now time.Time) string {
	s := c.GetStatus()
	var t string
	switch s.GetState() {
	case v1.ContainerState_CONTAINER_STATE_RUNNING:
		t = "up " + ago(s.GetStartedAt(), now)
		if s.GetHealth() != v1.Health_HEALTH_UNSPECIFIED {
			t += " (" + enumText(s.GetHealth().String(), "HEALTH_") + ")"
		}
	case v1.ContainerState_CONTAINER_STATE_EXITED:
		t = fmt.Sprintf("exited (%d) %s ago", s.GetExitCode(), ago(s.GetFinishedAt(), now))
		if s.GetOomKilled() {
			t += ", out of memory"
		}
	case v1.ContainerState_CONTAINER_STATE_RESTARTING:
		t = fmt.Sprintf("restarting (%d), %d times", s.GetExitCode(), s.GetRestartCount())
	case v1.ContainerState_CONTAINER_STATE_UNSPECIFIED:
		t = "pending"
	default:
		t = enumText(s.GetState().String(), "CONTAINER_STATE_")
	}
	if m := s.GetMessage(); m != "" && s.GetState() != v1.ContainerState_CONTAINER_STATE_RUNNING {
		t += ": " + m
	}
	return t
}

func portsText(ports []*v1.PortMapping) string {
	var out []string
	for _, p := range ports {
		ip := p.GetHostIp()
		if ip == "" {
			ip = "*"
		}
		proto := p.GetProtocol()
		if proto == "" {
			proto = "tcp"
		}
		if p.GetHostPort() == 0 {
			out = append(out, fmt.Sprintf("%d/%s", p.GetContainerPort(), proto))
			continue
		}
		out = append(out, fmt.Sprintf("%s:%d->%d/%s", ip, p.GetHostPort(), p.GetContainerPort(), proto))
	}
	return strings.Join(out, ", ")
}

// shortID is enough of an id to name the thing.
func shortID(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	return id[:min(len(id), 12)]
}
