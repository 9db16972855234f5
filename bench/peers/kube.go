package main

import (
	"context"
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/events"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/scheduler"
	internalcache "k8s.io/kubernetes/pkg/scheduler/backend/cache"
	"k8s.io/kubernetes/pkg/scheduler/framework"
	"k8s.io/kubernetes/pkg/scheduler/profile"
)

// kube is kube-scheduler with all nodes and pods in its cache.
type kube struct {
	ctx      context.Context
	log      klog.Logger
	sched    *scheduler.Scheduler
	snapshot *internalcache.Snapshot
	fwk      framework.Framework
	specs    map[[2]int64][]v1.Container // pods of one size share it
	labels   map[string]map[string]string
	placed   map[string]*v1.Pod
}

func newKube(ctx context.Context, hosts, perHost int) (*kube, error) {
	client := fake.NewClientset()
	k := &kube{ctx: ctx, log: klog.FromContext(ctx), snapshot: internalcache.NewEmptySnapshot(),
		specs: map[[2]int64][]v1.Container{}, labels: map[string]map[string]string{}, placed: map[string]*v1.Pod{}}
	recorders := profile.NewRecorderFactory(events.NewBroadcaster(&events.EventSinkImpl{Interface: client.EventsV1()}))
	sched, err := scheduler.New(ctx, client, informers.NewSharedInformerFactory(client, 0), nil, recorders,
		scheduler.WithNodeInfoSnapshot(k.snapshot))
	if err != nil {
		return nil, fmt.Errorf("making kube-scheduler: %w", err)
	}
	k.sched, k.fwk = sched, sched.Profiles[v1.DefaultSchedulerName]
	for h := range hosts {
		capacity := v1.ResourceList{
			v1.ResourceCPU:    *resource.NewMilliQuantity(hostCPU, resource.DecimalSI),
			v1.ResourceMemory: *resource.NewQuantity(hostMemory, resource.BinarySI),
			v1.ResourcePods:   *resource.NewQuantity(1000, resource.DecimalSI),
		}
		name := hostName(h)
		sched.Cache.AddNode(k.log, &v1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{v1.LabelHostname: name}},
			Status:     v1.NodeStatus{Capacity: capacity, Allocatable: capacity},
		})
		for m := range machines {
			for c := range perHost / machines {
				pod := k.pod(resident(h, m, c, hosts))
				pod.Spec.NodeName = name
				if err := sched.Cache.AddPod(k.log, pod); err != nil {
					return nil, err
				}
			}
		}
	}
	return k, k.sched.Cache.UpdateSnapshot(k.log, k.snapshot)
}

func (k *kube) pod(r request) *v1.Pod {
	size := [2]int64{r.cpu, r.memory}
	if k.specs[size] == nil {
		k.specs[size] = []v1.Container{{Name: "c", Image: "image", Resources: v1.ResourceRequirements{Requests: v1.ResourceList{
			v1.ResourceCPU:    *resource.NewMilliQuantity(r.cpu, resource.DecimalSI),
			v1.ResourceMemory: *resource.NewQuantity(r.memory, resource.BinarySI),
		}}}}
	}
	if k.labels[r.service] == nil {
		k.labels[r.service] = map[string]string{"service": r.service}
	}
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: r.id, UID: types.UID(r.id), Namespace: r.project, Labels: k.labels[r.service]},
		Spec:       v1.PodSpec{Containers: k.specs[size], SchedulerName: v1.DefaultSchedulerName},
	}
}

func (k *kube) place(r request, shape string) (decision, whole time.Duration, err error) {
	switch shape {
	case "plain":
		r.service = "none"
	case "anti":
		r.service = "alone"
	}
	pod := k.pod(r)
	same := &metav1.LabelSelector{MatchLabels: pod.Labels}
	switch shape {
	case "spread":
		pod.Spec.TopologySpreadConstraints = []v1.TopologySpreadConstraint{{MaxSkew: 1, TopologyKey: v1.LabelHostname,
			WhenUnsatisfiable: v1.ScheduleAnyway, LabelSelector: same}}
	case "anti":
		pod.Spec.Affinity = &v1.Affinity{PodAntiAffinity: &v1.PodAntiAffinity{
			RequiredDuringSchedulingIgnoredDuringExecution: []v1.PodAffinityTerm{{TopologyKey: v1.LabelHostname, LabelSelector: same}}}}
	}
	info, err := framework.NewPodInfo(pod)
	if err != nil {
		return 0, 0, err
	}
	queued := &framework.QueuedPodInfo{PodInfo: info, PodSignature: k.fwk.SignPod(k.ctx, pod)}
	start := time.Now()
	if err := k.sched.Cache.UpdateSnapshot(k.log, k.snapshot); err != nil {
		return 0, 0, err
	}
	found, err := k.sched.SchedulePod(k.ctx, k.fwk, framework.NewCycleState(), queued)
	decision = time.Since(start)
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w", r.id, err)
	}
	assumed := pod.DeepCopy()
	assumed.Spec.NodeName = found.SuggestedHost
	if err := k.sched.Cache.AssumePod(k.log, assumed); err != nil {
		return 0, 0, err
	}
	k.placed[r.id] = assumed
	return decision, time.Since(start), nil
}

func (k *kube) remove(id string) error {
	pod := k.placed[id]
	delete(k.placed, id)
	return k.sched.Cache.ForgetPod(k.log, pod)
}
