package simulate

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"
)

// Report is what a policy came to in the measured time. Hours are hours, GiB are
// 2^30 bytes, waits are seconds from arrival to the first start.
type Report struct {
	HostHours    float64 `json:"host_hours"`
	MachineHours float64 `json:"machine_hours"`
	LowerBound   float64 `json:"lower_bound_host_hours"`
	// LowerBoundMachines are the least machine-hours: machines as large as the
	// largest host, none of them shared by those who must not.
	LowerBoundMachines float64 `json:"lower_bound_machine_hours"`
	HostHoursRatio     float64 `json:"host_hours_ratio"`
	PeakHosts          int     `json:"peak_hosts"`
	PeakMachines       int     `json:"peak_machines"`
	ContainerMoves     int     `json:"container_moves"`
	MachineMoves       int     `json:"machine_moves"`
	MachineMoveGiB     float64 `json:"machine_move_gib"`
	WaitMean           float64 `json:"wait_mean_s"`
	WaitP50            float64 `json:"wait_p50_s"`
	WaitP99            float64 `json:"wait_p99_s"`
	// Rejected never ran, or ran on a host that failed and never again.
	Rejected int `json:"rejected"`
	// HACoveredShare is the share of instants at which any one host could have
	// been lost: all that ran there fitted on the rest at once.
	HACoveredShare float64 `json:"ha_covered_share"`
	// Decisions are containers that the policy was asked to place. DecisionsPerS
	// counts all the time that the policy took, for whatever it did; DecisionP99
	// is of its calls that decided about a container.
	Decisions     int     `json:"decisions"`
	DecisionsPerS float64 `json:"decisions_per_s"`
	DecisionP99   float64 `json:"decision_p99_us"`
	// Baselines are the same figures of the alternatives, in the same run.
	Baselines map[string]*Report `json:"baselines,omitempty"`

	name            string
	arrivals        int
	moves1000       float64
	measuredSeconds float64
}

// WriteText prints the report as a table, a row for each policy.
func (r *Report) WriteText(w io.Writer) error {
	fmt.Fprintf(w, "Measured: %s of the trace, %d arrivals; at least %.0f host-hours and %.0f machine-hours are needed.\n\n", hoursText(r.measuredSeconds), r.arrivals, r.LowerBound, r.LowerBoundMachines)
	t := tabwriter.NewWriter(w, 2, 4, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "POLICY\tHOST-HOURS\tOF BOUND\tPEAK\tMACHINE-HOURS\tPEAK\tMOVES\tPER 1000\tMIGRATED\tWAIT MEAN\tP50\tP99\tREJECTED\tLOSS COVERED\tDECISIONS/S\tP99\t")
	row := func(name string, r *Report) {
		fmt.Fprintf(t, "%s\t%.0f\t%.3f\t%d\t%.0f\t%d\t%d\t%.1f\t%d, %.0f GiB\t%.1fs\t%.1fs\t%.1fs\t%d\t%.2f%%\t%.0f\t%.0fµs\t\n", name, r.HostHours, r.HostHoursRatio, r.PeakHosts,
			r.MachineHours, r.PeakMachines, r.ContainerMoves, r.moves1000, r.MachineMoves, r.MachineMoveGiB, r.WaitMean, r.WaitP50, r.WaitP99,
			r.Rejected, 100*r.HACoveredShare, r.DecisionsPerS, r.DecisionP99)
	}
	row(r.name, r)
	for _, n := range slices.Sorted(maps.Keys(r.Baselines)) {
		row(n, r.Baselines[n])
	}
	return t.Flush()
}

func hoursText(s float64) string {
	if s < 2*3600 {
		return fmt.Sprintf("%.0f minutes", s/60)
	}
	return fmt.Sprintf("%.1f hours", s/3600)
}
