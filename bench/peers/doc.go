// Command peers measures how fast Tandem's planner and kube-scheduler decide where a
// container runs: the same hosts, the same containers that are there already and the
// same ones to place, in the same process, in turns. `make peers` runs it.
//
// It is a Go module of its own, so that Kubernetes and what it needs stay out of
// Tandem's module.
//
// # What runs
//
// Of Kubernetes: the scheduler as scheduler.New makes it, with the default profile (all
// default plugins, percentageOfNodesToScore adaptive, parallelism 16), its own cache and
// its own snapshot. Timed as the decision are Cache.UpdateSnapshot and SchedulePod: what
// a scheduling cycle does to find the node. Of Tandem: State.Decide, with the reasons
// that every decision keeps.
//
// Decisions a second count the bookkeeping too: for Kubernetes the pod's copy and
// Cache.AssumePod, for Tandem SetContainer and Commit. A hundred decisions later a
// container goes again; that is not timed on either side.
//
// # What does not
//
// No API server, no queue, no events, no binding: a real kube-scheduler does less than
// what is printed here. Neither does the server of Tandem run: no store, no agents.
//
// # What is not the same
//
//   - A node is a host. Kubernetes chooses one of 10,000 nodes; Tandem chooses among
//     the same hosts, 100,000 machines on them, growth and new machines as well, of the
//     container's project only. Kubernetes' projects (namespaces) share nodes.
//   - At 10,000 nodes Kubernetes looks for 500 nodes that fit (5 %) and scores those; the
//     planner weighs a few dozen candidates out of an index of what is free.
//   - spread: Kubernetes has a topologySpreadConstraint on the host name (ScheduleAnyway,
//     maxSkew 1), Tandem Spread "host"; 250 replicas of each service are there.
//   - spread and anti make kube-scheduler read every pod of every node for each
//     decision; with 100 on each that is what they cost. `-containers 10` shows less of it.
//   - anti: Kubernetes has a required podAntiAffinity to the own service by host name,
//     Tandem an AntiRule with at most none on the host.
//   - Pods of the same shape that follow each other may be batched by kube-scheduler;
//     here they differ, as containers of many projects do, and seldom are.
//
// Rows with one core set GOMAXPROCS to 1 for both. Tandem's planner uses one in any case.
package main
