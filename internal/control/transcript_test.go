package control

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-units"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"tandem/api/policy"
	v1 "tandem/api/tandem/v1"
	"tandem/internal/control/fakehost"
	"tandem/internal/store"
)

var update = flag.Bool("update", false, "write what the transcripts should say")

// TestTranscripts replays testdata/*.txt: blocks of commands, each followed by
// "----" and all that came of them, line by line: the time in seconds, who (a
// controller; "to HOST" for what a host is told; "seen" for what hosts report), what
// became of whom, and why. Read them first: they are the controllers' specification
// by example. go test -update rewrites the answers.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no transcripts", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			raw, err := os.ReadFile(file)
			must(t, err)
			got := replay(t, string(raw))
			if *update {
				must(t, os.WriteFile(file, []byte(got), 0o644))
			} else if d := cmp.Diff(string(raw), got); d != "" {
				t.Errorf("%s (-want +got; -update accepts):\n%s", file, d)
			}
		})
	}
}

// replay runs a transcript's commands and returns it with the answers of now.
func replay(t *testing.T, text string) string {
	x := &script{world: newWorld(t)}
	var out strings.Builder
	for block := range strings.SplitSeq(strings.TrimSpace(text), "\n\n") {
		commands, _, _ := strings.Cut(block, "\n----")
		out.WriteString(commands + "\n")
		asked := false
		for line := range strings.SplitSeq(commands, "\n") {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
				x.do(line)
				asked = true
			}
		}
		if asked {
			x.settle()
			out.WriteString("----\n" + x.out.String())
			x.out.Reset()
		}
		out.WriteString("\n")
	}
	return strings.TrimRight(out.String(), "\n") + "\n"
}

type script struct{ *world }

// settings are the key=value words of a command.
type settings map[string]string

func (s settings) duration(t *testing.T, key string) time.Duration {
	if s[key] == "" {
		return 0
	}
	d, err := time.ParseDuration(s[key])
	must(t, err)
	return d
}

func (s settings) number(t *testing.T, key string, otherwise int64) int64 {
	if s[key] == "" {
		return otherwise
	}
	n, err := strconv.ParseInt(s[key], 10, 32)
	must(t, err)
	return n
}

func (s settings) bytes(t *testing.T, key string) int64 {
	if s[key] == "" {
		return 0
	}
	n, err := units.RAMInBytes(s[key])
	must(t, err)
	return n
}

// do runs one command: a verb, names, and key=value settings.
func (x *script) do(line string) {
	t := x.t
	words := strings.Fields(line)
	verb, names, set := words[0], []string{}, settings{}
	for _, word := range words[1:] {
		if k, v, ok := strings.Cut(word, "="); ok {
			set[k] = v
		} else {
			names = append(names, word)
		}
	}
	switch verb {
	case "host": // zone= cpu= memory= boot= prepare= machine= (the largest there is)
		size := &v1.Size{CpuMilli: 1000 * set.number(t, "cpu", 8), MemoryBytes: 16 << 30}
		if m := set.bytes(t, "memory"); m > 0 {
			size.MemoryBytes = m
		}
		k := &v1.Capabilities{GrowCpu: true, ShrinkCpu: true, GrowMemory: true, ShrinkMemory: true, HotDisk: true, Clone: true, Metal: true, MemoryStepBytes: 64 << 20}
		if m := set.bytes(t, "machine"); m > 0 {
			k.MaxMachine = &v1.Size{MemoryBytes: m}
		}
		x.hosts[names[0]] = &simHost{Host: fakehost.New(fakehost.Options{ID: "h-" + names[0], Hostname: names[0], Zone: set["zone"], Capacity: size, Capabilities: k, Clock: x.clock,
			Boot: set.duration(t, "boot"), Prepare: set.duration(t, "prepare")})}
		x.connect(names[0])
	case "connect":
		x.connect(names[0])
	case "disconnect":
		x.disconnect(names[0])
	case "restart":
		x.serve()
	case "image": // healthy= ends= code= stops= fails=
		s := fakehost.Script{HealthyAfter: set.duration(t, "healthy"), StopsAfter: set.duration(t, "stops"), Fail: strings.ReplaceAll(set["fails"], "-", " "),
			RunFor: set.duration(t, "ends"), Exits: set["ends"] != "", ExitCode: int32(set.number(t, "code", 0))}
		for _, h := range x.hosts {
			h.Script(names[0], s)
		}
	case "load": // of all containers of an image: cpu= (thousandths, together) memory= (each) pressure= (percent) silent=yes kernel=old
		l := fakehost.Load{CPUMilli: set.number(t, "cpu", 0), MemoryBytes: set.bytes(t, "memory"), Pressure: float64(set.number(t, "pressure", 0)), Silent: set["silent"] == "yes"}
		l.NoPressure = set["kernel"] == "old"
		for _, h := range x.hosts {
			h.Load(names[0], l)
		}
	case "project":
		tx := x.st.Txn()
		tx.Create(&v1.Project{Meta: &v1.Meta{Name: names[0], Id: "p-" + names[0]}})
		cidr, err := x.ctl.Carver(x.st.Snapshot()).Take("")
		must(t, err)
		tx.Create(&v1.Network{Meta: &v1.Meta{Project: names[0], Name: "default", Id: "n-" + names[0]}, Cidr: cidr})
		_, err = tx.Commit(x.ctx)
		must(t, err)
	case "service":
		x.service(names[0], names[1], set)
	case "scale":
		n, err := strconv.ParseInt(names[2], 10, 32)
		must(t, err)
		change(x, store.Key{Kind: store.Services, Project: names[0], Name: names[1]}, func(s *v1.Service) { s.Replicas = int32(n) })
	case "down": // grace=
		if set["grace"] != "" {
			for _, c := range store.List[*v1.Container](x.st, names[0]) {
				change(x, store.KeyOf(c), func(c *v1.Container) { c.StopTimeout = durationpb.New(set.duration(t, "grace")) })
			}
		}
		change(x, store.Key{Kind: store.Projects, Name: names[0]}, func(p *v1.Project) { p.Meta.Deleting = true })
	case "policy": // losses=
		n := int32(set.number(t, "losses", 0))
		x.policy(&v1.ChangePolicyRequest{HostLosses: &n})
	case "pool": // reserve= limit= (of CPUs) shares=
		x.policy(&v1.ChangePolicyRequest{Pools: []*v1.Pool{{Path: names[0], Shares: set.number(t, "shares", 0),
			Reservation: &v1.Size{CpuMilli: 1000 * set.number(t, "reserve", 0)}, Limit: &v1.Size{CpuMilli: 1000 * set.number(t, "limit", 0)}}}})
	case "quota": // containers= machines=
		x.policy(&v1.ChangePolicyRequest{Quotas: []*v1.Quota{{Project: names[0], Containers: int32(set.number(t, "containers", 0)), Machines: int32(set.number(t, "machines", 0))}}})
	case "no-quota":
		x.policy(&v1.ChangePolicyRequest{RemoveQuotas: names})
	case "crash":
		for _, h := range x.hosts {
			h.Crash(names[0])
		}
	case "exit":
		for _, h := range x.hosts {
			h.Exit(names[0], int32(set.number(t, "code", 0)))
		}
	case "pass":
		d, err := time.ParseDuration(names[0])
		must(t, err)
		x.pass(d)
	default:
		t.Fatalf("no command %q", line)
	}
}

// policy changes what holds for the whole cluster, as a user's request does.
func (x *script) policy(r *v1.ChangePolicyRequest) {
	now, _ := store.Get[*v1.Policy](x.st, store.PolicyKey)
	next, err := policy.Change(now, r)
	must(x.t, err)
	if now == nil {
		next.Meta = &v1.Meta{Id: "policy", Name: store.PolicyKey.Name}
		_, err = x.st.Create(x.ctx, next)
		must(x.t, err)
		return
	}
	change(x, store.PolicyKey, func(p *v1.Policy) { p.HostLosses, p.Pools, p.Quotas = next.HostLosses, next.Pools, next.Quotas })
}

// change edits a record as a user's request does.
func change[T store.Record](x *script, k store.Key, fn func(T)) {
	x.t.Helper()
	_, err := store.Update(x.ctx, x.st, k, func(r T) error {
		fn(r)
		r.GetMeta().Generation++
		return nil
	})
	must(x.t, err)
}

// service makes a service or changes it, as `up` does. Settings: image= replicas=
// cpu= (thousandths) memory= needs=SERVICE:CONDITION,… restart=POLICY[:RETRIES]
// check=yes publish=HOST:PORT grace= order= parallel= isolation=metal class=batch spread=
// volume=NAME min= max= target= (percent of cpu) pressure= pool= covered=no
// apart=SERVICE:LAYER:AT-MOST near=SERVICE:LAYER zone=
func (x *script) service(project, name string, set settings) {
	t := x.t
	spec := &v1.ContainerSpec{Image: set["image"], Resources: &v1.Resources{CpuMilliReservation: set.number(t, "cpu", 0), MemoryBytesReservation: set.bytes(t, "memory")}}
	if set["needs"] != "" {
		for need := range strings.SplitSeq(set["needs"], ",") {
			service, condition, _ := strings.Cut(need, ":")
			spec.DependsOn = append(spec.DependsOn, &v1.Dependency{Service: service, Condition: condition, Required: true})
		}
	}
	if when, retries, _ := strings.Cut(set["restart"], ":"); when != "" {
		n, _ := strconv.Atoi(retries)
		spec.Restart = &v1.RestartPolicy{Name: when, MaxRetries: int32(n)}
	}
	if set["check"] == "yes" {
		spec.Healthcheck = &v1.HealthCheck{Test: []string{"CMD", "check"}}
	}
	if outer, inner, ok := strings.Cut(set["publish"], ":"); ok {
		o, err := strconv.ParseUint(outer, 10, 16)
		must(t, err)
		i, err := strconv.ParseUint(inner, 10, 16)
		must(t, err)
		spec.Ports = []*v1.PortMapping{{HostPort: uint32(o), ContainerPort: uint32(i), Protocol: "tcp"}}
	}
	if set["grace"] != "" {
		spec.StopGracePeriod = durationpb.New(set.duration(t, "grace"))
	}
	if spec.Pool = set["pool"]; set["zone"] != "" {
		spec.ZoneAffinity = []string{set["zone"]}
	}
	if set["class"] == "batch" {
		spec.WorkClass = v1.WorkClass_WORK_CLASS_BATCH
	}
	if set["isolation"] == "metal" {
		spec.Isolation = v1.Isolation_ISOLATION_METAL
	}
	if v := set["volume"]; v != "" {
		spec.Mounts = []*v1.Mount{{Type: v1.Mount_TYPE_VOLUME, Source: v, Target: "/data"}}
		_, err := x.st.Create(x.ctx, &v1.Volume{Meta: &v1.Meta{Project: project, Name: v, Id: "v-" + v}})
		must(t, err)
	}
	fresh := &v1.Service{Meta: &v1.Meta{Project: project, Name: name, Id: "s-" + project + "-" + name, Generation: 1}}
	fill := func(s *v1.Service) {
		s.Template, s.Hash, s.Replicas = spec, ServiceHash(spec), int32(set.number(t, "replicas", 1))
		s.Spread, s.Uncovered, s.Company = set["spread"], set["covered"] == "no", nil
		for _, key := range []string{"near", "apart"} {
			if set[key] == "" {
				continue
			}
			words := append(strings.Split(set[key], ":"), "0")
			n, err := strconv.ParseInt(words[2], 10, 32)
			must(t, err)
			s.Company = append(s.Company, &v1.CompanyRule{Service: words[0], Layer: words[1], Near: key == "near", AtMost: int32(n)})
		}
		if set["max"] != "" {
			s.Scale = &v1.ScalePolicy{Min: int32(set.number(t, "min", 1)), Max: int32(set.number(t, "max", 1)), CpuTarget: float64(set.number(t, "target", 0)) / 100,
				PressureTarget: float64(set.number(t, "pressure", 0))}
		}
		s.UpdateOrder, s.UpdateParallelism = set["order"], int32(set.number(t, "parallel", 0))
	}
	k := store.KeyOf(fresh)
	if slices.ContainsFunc(store.List[*v1.Service](x.st, project), func(s *v1.Service) bool { return s.Meta.Name == name }) {
		change(x, k, fill)
		return
	}
	fill(fresh)
	_, err := x.st.Create(x.ctx, fresh)
	must(t, err)
}
