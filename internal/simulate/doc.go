// Package simulate replays a trace of containers on simulated time, through the
// real planner and through the alternatives people use today, and accounts for
// what each of them cost: hosts, machines, moves, waiting, and whether the loss of
// a host could have been survived at every instant.
//
// # Use
//
//	trace, err := simulate.Read(file, simulate.ReadOptions{Name: "trace.csv"})
//	if err != nil { ... }             // names the line
//	out, err := simulate.Run(ctx, trace, simulate.Options{
//		Hosts:    []simulate.Pool{{Size: simulate.Size{CPU: 96000, Memory: 256 << 30}}},
//		Overhead: simulate.Size{CPU: 100, Memory: 256 << 20},
//	})
//	json.NewEncoder(os.Stdout).Encode(out)
//
// A World is what is true in the simulation: hosts, machines, containers and a
// clock that jumps from event to event. A Policy is asked at each event and acts
// through the World's methods, which check every rule: a policy that overfills a
// machine ends the run with an error, not with a good figure. Baselines and the
// real planner are policies alike, get the same events, and pay the same times.
//
// Everything is deterministic: same trace, same options, same transcript. Only the
// durations of decisions come from outside, through Options.Stopwatch. Nothing
// here reads a clock or a file except from the readers and writers handed in.
//
// # Transcript
//
// Options.Transcript gets a line of JSON for each event and action (Line). Check
// reads such a file with none of the simulator's state, checks the rules again and
// computes all figures anew.
package simulate
