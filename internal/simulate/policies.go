package simulate

var makers = []maker{
	{"tandem", "the planner, with machines that grow and a failover guarantee", func(o *Options, _ *Trace) Policy { return newTandem(o) }},
	{"vm-per-container", "a VM for each container, best fit", func(*Options, *Trace) Policy { return &single{} }},
	{"kubernetes", "Kubernetes' default spreading, fixed VM shapes, cluster autoscaler", func(o *Options, _ *Trace) Policy { return newKube("kubernetes", true, shapesOf(o, 8, 4, 2)...) }},
	{"best-fit", "best fit, fixed VM shapes, cluster autoscaler", func(o *Options, _ *Trace) Policy { return newKube("best-fit", false, shapesOf(o, 8, 4, 2)...) }},
	{"half-host", "VMs of half a host, best fit, cluster autoscaler", func(o *Options, _ *Trace) Policy { return newKube("half-host", false, shapesOf(o, 2)...) }},
	{"whole-host", "VMs of a whole host, best fit, cluster autoscaler", func(o *Options, _ *Trace) Policy { return newKube("whole-host", false, shapesOf(o, 1)...) }},
}

// shapesOf are the n-th parts of the largest host.
func shapesOf(o *Options, parts ...int64) []Size {
	largest := o.Hosts[0].Size
	for _, p := range o.Hosts {
		if p.Size.share(largest) > 1 {
			largest = p.Size
		}
	}
	var list []Size
	for _, n := range parts {
		list = append(list, Size{largest.CPU / n, largest.Memory / n})
	}
	return list
}
