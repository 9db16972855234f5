package planner_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tandem/api/resource"
	"tandem/internal/planner"
)

var update = flag.Bool("update", false, "write what the transcripts should say")

// TestTranscripts replays testdata/*.txt: blocks of commands, each followed by
// "----" and what the planner answered. They are the planner's specification by
// example; read them first. go test -update rewrites the answers.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			raw, err := os.ReadFile(file)
			must(t, err)
			x := &script{t: t, s: planner.New(), hosts: map[string]planner.Host{}, machines: map[string]planner.Machine{}}
			var out strings.Builder
			for block := range strings.SplitSeq(strings.TrimSpace(string(raw)), "\n\n") {
				commands, _, asked := strings.Cut(block, "\n----")
				out.WriteString(strings.TrimRight(commands, "\n") + "\n")
				answer := ""
				for line := range strings.SplitSeq(commands, "\n") {
					if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
						answer += x.do(line)
					}
				}
				if asked {
					out.WriteString("----\n" + answer)
				} else if answer != "" {
					out.WriteString("----\n" + answer)
				}
				out.WriteString("\n")
			}
			got := strings.TrimRight(out.String(), "\n") + "\n"
			if *update {
				must(t, os.WriteFile(file, []byte(got), 0o644))
				return
			}
			if d := cmp.Diff(string(raw), got); d != "" {
				t.Errorf("%s (-want +got; -update accepts):\n%s", file, d)
			}
		})
	}
}

type script struct {
	t        *testing.T
	s        *planner.State
	hosts    map[string]planner.Host
	machines map[string]planner.Machine
	booted   int
}

func (x *script) size(v string) planner.Size {
	z, err := resource.ParseSize(v)
	must(x.t, err)
	return planner.Size{CPU: z.CPU, Memory: z.Memory}
}

// do runs one command: a verb, names, and key=value settings or bare flags.
func (x *script) do(line string) string {
	words := strings.Fields(line)
	verb, names, set := words[0], []string{}, map[string]string{}
	for _, w := range words[1:] {
		if k, v, ok := strings.Cut(w, "="); ok {
			set[k] = v
		} else {
			names = append(names, w)
		}
	}
	var err error
	switch verb {
	case "host":
		err = x.host(names[0], set)
	case "cordon", "uncordon", "down", "up":
		h := x.hosts[names[0]]
		switch verb {
		case "cordon", "uncordon":
			h.Cordoned = verb == "cordon"
		default:
			h.Down = verb == "down"
		}
		x.hosts[h.ID] = h
		err = x.s.SetHost(h)
	case "machine":
		m := planner.Machine{ID: names[0], Host: set["on"], Project: set["project"], Size: x.size(set["size"]), Ceiling: x.size(or(set["ceiling"], set["size"]))}
		m.Pinned = set["pinned"] == "yes"
		if set["isolation"] == "shared" {
			m.Isolation = planner.Shared
		}
		err = x.s.SetMachine(m)
	case "container":
		for _, n := range names {
			err = x.container(n, set)
			must(x.t, err)
		}
	case "volume":
		x.s.SetVolume(names[0], set["on"])
	case "remove":
		x.s.RemoveContainer(names[0])
	case "place":
		return x.ask(planner.Question{Place: names}, set)
	case "policy":
		err = x.s.SetPolicy(planner.Policy{HostLosses: x.number(set["losses"]), Evict: set["evict"] == "yes"})
	case "pool":
		p := planner.Pool{Path: names[0]}
		if v := set["limit"]; v != "" {
			p.Limit = x.size(v)
		}
		if v := set["reservation"]; v != "" {
			p.Reservation = x.size(v)
		}
		p.Shares = int64(x.number(set["shares"]))
		err = x.s.SetPool(p)
	case "quota":
		n, e := strconv.Atoi(set["containers"])
		must(x.t, e)
		err = x.s.SetQuota(names[0], planner.Quota{Containers: n})
	case "survives":
		ok, who := x.s.Survives()
		if ok {
			return "every loss has a destination that fits\n"
		}
		return "no destination for " + strings.Join(who, ", ") + "\n"
	case "standby":
		return strings.Join(x.s.Standby(names[0]), ", ") + "\n"
	case "lost":
		return x.ask(planner.Question{HostLost: names}, set)
	case "empty":
		return x.ask(planner.Question{EmptyHost: names}, set)
	case "rebalance":
		return x.ask(planner.Question{Rebalance: &planner.Budget{Containers: x.number(set["moves"]), Machines: x.number(set["migrations"]), Bytes: -1}}, set)
	case "consolidate":
		return x.ask(planner.Question{Consolidate: &planner.Consolidate{PowerOff: true,
			Budget: planner.Budget{Containers: x.number(set["moves"]), Machines: x.number(set["migrations"]), Bytes: -1}}}, set)
	case "what-if":
		q := &planner.WhatIf{}
		if v := set["add"]; v != "" {
			z := x.size(v)
			h := testHost("added", z.CPU, z.Memory)
			q.AddHosts = []planner.Host{h}
		}
		if v := set["remove"]; v != "" {
			q.RemoveHosts = []string{v}
		}
		if v := set["scale"]; v != "" {
			w := strings.Split(v, "/")
			q.Scale = []planner.Scale{{Project: w[0], Service: w[1], Replicas: x.number(w[2])}}
		}
		set["commit"] = "no"
		return x.ask(planner.Question{WhatIf: q}, set)
	case "trim":
		q := &planner.Trim{Shrink: set["shrink"] == "yes"}
		if v := set["idle"]; v != "" {
			q.Idle = strings.Split(v, ",")
		}
		return x.ask(planner.Question{Trim: q}, set)
	default:
		x.t.Fatalf("unknown command %q", line)
	}
	if err != nil {
		return "error: " + err.Error() + "\n"
	}
	return ""
}

func (x *script) number(v string) int {
	n, err := strconv.Atoi(or(v, "0"))
	must(x.t, err)
	return n
}

func or(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

func (x *script) host(id string, set map[string]string) error {
	z := x.size(set["size"])
	h := testHost(id, z.CPU, z.Memory)
	h.Zone = set["zone"]
	h.Off = set["off"] == "yes"
	if set["migrate"] == "yes" {
		h.Capabilities.MoveSecondsGiB = 1
	}
	h.MachineExtra.CPU, h.GuestExtra.CPU = 0, 0
	h.Capabilities.Grow = set["grow"] != "no"
	h.Capabilities.Metal = set["metal"] != "no"
	if v := set["max"]; v != "" {
		h.Capabilities.MaxMachine = x.size(v)
	}
	x.hosts[id] = h
	return x.s.SetHost(h)
}

func (x *script) container(id string, set map[string]string) error {
	c := planner.Container{ID: id, Project: set["project"], Service: set["service"], Spread: set["spread"], Machine: set["in"], Host: set["on"]}
	if v := set["size"]; v != "" {
		c.Request = x.size(v)
	}
	c.Stateful, c.Pool = set["stateful"] == "yes", set["pool"]
	if set["class"] == "batch" {
		c.Class = planner.Batch
	}
	if v := set["near"]; v != "" {
		service, layer, _ := strings.Cut(v, "/")
		c.Near = []planner.NearRule{{Service: service, Layer: layer}}
	}
	switch set["isolation"] {
	case "shared":
		c.Isolation = planner.Shared
	case "own":
		c.Isolation = planner.Own
	case "metal":
		c.Isolation = planner.Metal
	}
	if v := set["port"]; v != "" {
		n, err := strconv.ParseUint(v, 10, 16)
		must(x.t, err)
		c.Ports = []planner.Port{{Port: uint16(n)}}
	}
	if v := set["volume"]; v != "" {
		c.Volumes = []string{v}
	}
	if v := set["hosts"]; v != "" {
		c.Hosts = strings.Split(v, ",")
	}
	if v := set["not-beside"]; v != "" {
		service, layer, _ := strings.Cut(v, "/")
		c.Anti = []planner.AntiRule{{Service: service, Layer: layer}}
	}
	return x.s.SetContainer(c)
}

// ask prints the plan and applies it, unless commit=no.
func (x *script) ask(q planner.Question, set map[string]string) string {
	p, err := x.s.Decide(q)
	if err != nil {
		return "error: " + err.Error() + "\n"
	}
	names := map[string]string{}
	for _, a := range p.Actions {
		if a.Kind == planner.Boot {
			x.booted++
			names[a.Machine] = fmt.Sprintf("m-%d", x.booted)
		}
	}
	if set["commit"] != "no" {
		must(x.t, x.s.Commit(p, names))
		p.Rename(names)
	}
	var b strings.Builder
	for _, a := range p.Actions {
		switch a.Kind {
		case planner.Boot:
			fmt.Fprintf(&b, "boot %s on %s: %s, up to %s\n", a.Machine, a.Host, a.To, a.Ceiling)
		case planner.Grow:
			fmt.Fprintf(&b, "grow %s on %s: %s -> %s\n", a.Machine, a.Host, a.From, a.To)
		case planner.Shrink:
			fmt.Fprintf(&b, "shrink %s on %s: %s -> %s\n  %s\n", a.Machine, a.Host, a.From, a.To, a.Reason.Summary)
		case planner.Stop:
			fmt.Fprintf(&b, "stop %s on %s\n  %s\n", a.Machine, a.Host, a.Reason.Summary)
		case planner.Place:
			fmt.Fprintf(&b, "place %s in %s on %s\n  %s\n", a.Container, a.Machine, a.Host, a.Reason.Summary)
		case planner.PowerOn, planner.PowerOff:
			fmt.Fprintf(&b, "%s %s\n  %s\n", a.Kind, a.Host, a.Reason.Summary)
		case planner.Move:
			fmt.Fprintf(&b, "move %s from %s to %s on %s\n  %s\n", a.Container, a.FromMachine, a.Machine, a.Host, a.Reason.Summary)
		case planner.Migrate, planner.Restart:
			fmt.Fprintf(&b, "%s %s from %s to %s: %s -> %s\n  %s\n", a.Kind, a.Machine, a.FromHost, a.Host, a.From, a.To, a.Reason.Summary)
		case planner.Evict:
			fmt.Fprintf(&b, "evict %s from %s on %s\n  %s\n", a.Container, a.FromMachine, a.FromHost, a.Reason.Summary)
		case planner.PlaceM:
			fmt.Fprintf(&b, "place %s on %s\n  %s\n", a.Container, a.Host, a.Reason.Summary)
		}
		if set["options"] == "yes" && a.Container != "" {
			printReason(&b, a.Reason)
		}
	}
	for _, u := range p.Unplaced {
		fmt.Fprintf(&b, "unplaced %s\n  %s\n  remedy: %s\n", u.Container, u.Reason.Summary, u.Remedy)
		if set["options"] == "yes" {
			printReason(&b, u.Reason)
		}
	}
	if b.Len() == 0 {
		return "nothing to do\n"
	}
	return b.String()
}

func printReason(b *strings.Builder, r planner.Reason) {
	for _, o := range r.Options {
		mark := " "
		if o.Chosen {
			mark = "*"
		}
		fmt.Fprintf(b, "  %s %-5s %s %.3f =", mark, o.Action, strings.TrimSpace(o.Machine+" "+o.Host), o.Cost)
		for _, t := range o.Terms {
			fmt.Fprintf(b, " %s %.3f", t.Name, t.Value)
		}
		b.WriteString("\n")
	}
	for _, e := range r.Exclusions {
		fmt.Fprintf(b, "  - %d by %s (%s): %s\n", e.Count, e.Rule, e.Layer, e.Detail)
	}
}
