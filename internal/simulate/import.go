package simulate

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
)

// azureRow reads a line of azure2017_dev.csv (AzurePublicDataset V1, CC-BY 4.0).
// A batch is one customer's, which says nothing about replicas: it is no service,
// but Trace.Zipf makes projects of batches. Lives that were cut at the end of the observation (censored) count as
// they are written.
func azureRow(get func(string) string) (Request, error) {
	q, err := commonRow(get, "id", "arrive_s", "life_s")
	if err != nil {
		return q, err
	}
	cpu, err := number(get("vcpu"), maxCPU/1000)
	if err != nil {
		return q, fmt.Errorf("vcpu %w", err)
	}
	mem, err := number(get("mem_gib"), maxMemory>>30)
	if err != nil {
		return q, fmt.Errorf("mem_gib %w", err)
	}
	q.Need = sizeOf(cpu*1000, mem*1024)
	batch, err := name("batch", get("batch"))
	if batch != "" {
		q.customer = "batch-" + batch
	}
	return q, err
}

// openbRow reads a line of openb_pod_list_*.csv (Alibaba cluster-trace-gpu-v2023):
// CPU and memory in the order of the file, all at once, and nobody leaves: static
// packing. GPUs are left out.
func openbRow(get func(string) string) (Request, error) {
	q, err := commonRow(get, "name", "", "")
	if err != nil {
		return q, err
	}
	cpu, err := number(get("cpu_milli"), maxCPU)
	if err != nil {
		return q, fmt.Errorf("cpu_milli %w", err)
	}
	mem, err := number(get("memory_mib"), maxMemory>>20)
	if err != nil {
		return q, fmt.Errorf("memory_mib %w", err)
	}
	q.Need = sizeOf(cpu, mem)
	if get("qos") == "BE" {
		q.Class = ClassBatch
	}
	return q, nil
}

// Pool is a number of like hosts that can be switched on.
type Pool struct {
	Size  Size
	Count int    // at most so many; 0: as many as are needed
	ID    string // of a single host that has a name
	Zone  string
}

// ParsePool reads "96c,256g*auto" or "96c,256g*12"; without a star it is one host.
func ParsePool(s string) (Pool, error) {
	text, count, star := strings.Cut(s, "*")
	size, err := ParseSize(text)
	if err != nil {
		return Pool{}, fmt.Errorf("hosts %q: %w", clip(s), err)
	}
	if size.CPU == 0 || size.Memory == 0 {
		return Pool{}, fmt.Errorf("hosts %q: a host needs CPU and memory", clip(s))
	}
	p := Pool{Size: size, Count: 1}
	if count = strings.TrimSpace(count); count == "auto" {
		p.Count = 0
	} else if star {
		n, err := number(count, 1e6)
		if err != nil || n < 1 || n != float64(int(n)) {
			return Pool{}, fmt.Errorf("hosts %q: after the star comes a number of hosts or auto", clip(s))
		}
		p.Count = int(n)
	}
	return p, nil
}

// ReadHosts reads a CSV of hosts: id,cpu_milli,mem_mib[,zone], or the openb node
// list (sn,cpu_milli,memory_mib,...).
func ReadHosts(r io.Reader, file string) ([]Pool, error) {
	lines, err := newLines(r, file)
	if err != nil {
		return nil, err
	}
	header, err := lines.next()
	if errors.Is(err, io.EOF) {
		return nil, lines.bad("the file is empty: a header line is needed, such as id,cpu_milli,mem_mib")
	} else if err != nil {
		return nil, err
	}
	cols, err := headerColumns(header)
	if err != nil {
		return nil, lines.bad("%v", err)
	}
	id, mem := "id", "mem_mib"
	if _, ok := cols["sn"]; ok {
		id, mem = "sn", "memory_mib"
	}
	for _, n := range []string{id, "cpu_milli", mem} {
		if _, ok := cols[n]; !ok {
			return nil, lines.bad("the header lacks %s of id,cpu_milli,mem_mib", n)
		}
	}
	var list []Pool
	seen := map[string]int{}
	for {
		fields, err := lines.next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		if len(fields) != len(header) {
			return nil, lines.bad("%d fields, but the header has %d", len(fields), len(header))
		}
		p, err := hostRow(cols, fields, id, mem)
		if err != nil {
			return nil, lines.bad("%v", err)
		}
		if before, ok := seen[p.ID]; ok {
			return nil, lines.bad("host %q is already on line %d", clip(p.ID), before)
		}
		seen[p.ID] = lines.n
		if len(list) == 1e6 {
			return nil, lines.bad("more than a million hosts")
		}
		list = append(list, p)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s: no hosts: %w", file, errdefs.ErrInvalidArgument)
	}
	return list, nil
}

func hostRow(cols columns, fields []string, id, mem string) (Pool, error) {
	p := Pool{Count: 1}
	var err error
	if p.ID, err = name("host", strings.TrimSpace(fields[cols[id]])); err != nil {
		return p, err
	}
	if p.ID == "" {
		return p, errors.New("the host has no id")
	}
	c, err := number(fields[cols["cpu_milli"]], maxCPU)
	if err != nil {
		return p, fmt.Errorf("cpu_milli %w", err)
	}
	m, err := number(fields[cols[mem]], maxMemory>>20)
	if err != nil {
		return p, fmt.Errorf("%s %w", mem, err)
	}
	p.Size = Size{CPU: int64(c), Memory: int64(m * (1 << 20))}
	if p.Size.CPU == 0 || p.Size.Memory == 0 {
		return p, fmt.Errorf("host %q has no CPU or no memory", clip(p.ID))
	}
	if i, ok := cols["zone"]; ok {
		if p.Zone, err = name("zone", strings.TrimSpace(fields[i])); err != nil {
			return p, err
		}
	}
	return p, nil
}
