package simulate

var makers = []maker{
	{"tandem", "the planner, with machines that grow and a failover guarantee", func(o *Options, _ *Trace) Policy { return newTandem(o) }},
	{"vm-per-container", "a VM for each container, best fit", func(*Options, *Trace) Policy { return &single{} }},
	{"kubernetes", "Kubernetes' default spreading, fixed VM shapes, cluster autoscaler", func(o *Options, _ *Trace) Policy {
		return newKube("kubernetes", true, largest(o), shapesOf(o, 8, 4, 2)...)
	}},
	{"best-fit", "best fit, fixed VM shapes, cluster autoscaler", func(o *Options, _ *Trace) Policy {
		return newKube("best-fit", false, largest(o), shapesOf(o, 8, 4, 2)...)
	}},
	{"half-host", "VMs of half a host, best fit, cluster autoscaler", func(o *Options, _ *Trace) Policy { return newKube("half-host", false, largest(o), shapesOf(o, 2)...) }},
	{"whole-host", "VMs of a whole host, best fit, cluster autoscaler", func(o *Options, _ *Trace) Policy { return newKube("whole-host", false, largest(o), shapesOf(o, 1)...) }},
}

// largest is the size of the largest host.
func largest(o *Options) Size {
	s := o.Hosts[0].Size
	for _, p := range o.Hosts {
		if p.Size.share(s) > 1 {
			s = p.Size
		}
	}
	return s
}

// shapesOf are the n-th parts of the largest host.
func shapesOf(o *Options, parts ...int64) []Size {
	var list []Size
	for _, n := range parts {
		whole := largest(o)
		list = append(list, Size{whole.CPU / n, whole.Memory / n})
	}
	return list
}
