package planner

// tallies counts containers by service: in a short list while the services are few, as
// in nearly every machine, else in a map.
type tallies struct {
	few  []tally
	many map[serviceKey]int
}

type tally struct {
	service serviceKey
	n       int
}

// maxFew bounds the list.
const maxFew = 8

func (t *tallies) find(k serviceKey) int {
	for i := range t.few {
		if t.few[i].service == k {
			return i
		}
	}
	return -1
}

func (t *tallies) count(k serviceKey) int {
	if t.many != nil {
		return t.many[k]
	}
	if i := t.find(k); i >= 0 {
		return t.few[i].n
	}
	return 0
}

func (t *tallies) add(k serviceKey) {
	if t.many != nil {
		t.many[k]++
		return
	}
	if i := t.find(k); i >= 0 {
		t.few[i].n++
		return
	}
	if len(t.few) < maxFew {
		t.few = append(t.few, tally{k, 1})
		return
	}
	t.many = t.all()
	t.many[k], t.few = 1, nil
}

func (t *tallies) remove(k serviceKey) {
	if t.many != nil {
		if n := t.many[k]; n > 1 {
			t.many[k] = n - 1
		} else if delete(t.many, k); len(t.many) == 0 {
			t.many = nil
		}
		return
	}
	i := t.find(k)
	if i < 0 {
		return
	}
	if t.few[i].n--; t.few[i].n == 0 {
		last := len(t.few) - 1
		t.few[i] = t.few[last]
		t.few[last] = tally{}
		t.few = t.few[:last]
	}
}

// all is a copy by service.
func (t *tallies) all() map[serviceKey]int {
	out := make(map[serviceKey]int, len(t.few)+len(t.many)+1)
	for _, x := range t.few {
		out[x.service] = x.n
	}
	for k, n := range t.many {
		out[k] = n
	}
	return out
}
