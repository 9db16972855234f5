package planner

// emptyHosts answers what goes where when hosts shall run nothing.
func (s *State) emptyHosts(ids []string) (*Plan, error) {
	hosts, err := s.named(ids)
	if err != nil {
		return nil, err
	}
	d := s.decision()
	d.relaxed = true
	defer d.back()
	for _, h := range hosts {
		was := h.Cordoned
		set := func(v bool) {
			s.unindexHost(h)
			h.Cordoned = v
			s.indexHost(h)
		}
		set(true)
		d.undo.note(func() {}, func() { set(was) }) // the host stays open in the state
		s.dismissSome(h, &d.undo)
	}
	b := &budget{Budget: unlimited}
	for _, h := range hosts {
		d.clear(h, b, "to empty "+h.ID)
	}
	return d.plan(), nil
}

// dismissSome finds other standby hosts for what stands by on h, where there are any.
func (s *State) dismissSome(h *host, undo *journal) {
	for _, f := range s.claimants(h) {
		for _, c := range f.all.byID() {
			for slot := range c.standby {
				if c.standby[slot] == h {
					s.restand(c, slot, h, undo)
				}
			}
		}
	}
}
