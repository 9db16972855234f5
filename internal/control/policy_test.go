package control

import (
	"fmt"
	"math/rand/v2"
	"testing"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
	"tandem/internal/store/storetest"
)

// Whatever services are asked for, in whichever order: what has a place is covered, as
// long as no host is lost.
func TestGuaranteeIsKept(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			x := &script{newWorld(t)}
			r := rand.New(rand.NewPCG(seed, 7))
			for i := range 5 {
				x.do(fmt.Sprintf("host h%d cpu=%d memory=16GiB", i, 4+r.IntN(5)))
			}
			x.do(fmt.Sprintf("policy losses=%d", 1+seed%2))
			x.do("project p")
			for i := range 5 {
				x.do(fmt.Sprintf("service p s%d image=web replicas=0 cpu=%d memory=%dMiB restart=always", i, 200+r.IntN(1800), 64+r.IntN(2000)))
			}
			placed := 0
			after := func(pass string) {
				t.Helper()
				x.do("pass " + pass)
				x.settle()
				g := x.ctl.Guarantee()
				if len(g.Exposed) > 0 {
					t.Fatalf("without a standby host: %v, of %d\n%s", g.Exposed, g.Covered, x.out.String())
				}
				placed = max(placed, g.Covered)
			}
			for range 25 {
				x.do(fmt.Sprintf("scale p s%d %d", r.IntN(5), r.IntN(9)))
				after("5s")
			}
			if placed < 5 {
				t.Errorf("only %d containers were ever covered: the test asks nothing", placed)
			}
			if seed%2 == 1 {
				return // a fold may leave one without its second standby host, and says so
			}
			for i := range 5 { // half-empty machines are folded
				x.do(fmt.Sprintf("scale p s%d 2", i))
			}
			after("20m")
		})
	}
}

// Of a policy that can't be read any more, the last copy that can be holds on.
func TestPolicyUnreadable(t *testing.T) {
	for name, c := range map[string]struct {
		all  bool
		want int
	}{"newest": {storetest.Newest, 1}, "all": {storetest.All, 0}} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, Options{})
			p := &v1.Policy{Meta: &v1.Meta{Id: "p", Name: store.PolicyKey.Name}, HostLosses: 1}
			l.create(p)
			_, err := store.Update(t.Context(), l.st, store.PolicyKey, func(p *v1.Policy) error {
				p.Pools = []*v1.Pool{{Path: "/a"}}
				return nil
			})
			must(t, err)
			losses := func() int {
				l.ctl.planMu.Lock()
				defer l.ctl.planMu.Unlock()
				l.ctl.plan.sync()
				return l.ctl.plan.state.Policy().HostLosses
			}
			if n := losses(); n != 1 {
				t.Fatal("the policy did not arrive:", n)
			}
			l.end()
			storetest.Damage(t, l.dir, store.PolicyKey, c.all)
			l.start(Options{})
			if n := losses(); n != c.want {
				t.Errorf("an unreadable policy became one for %d losses", n)
			}
		})
	}
}
