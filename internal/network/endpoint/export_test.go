package endpoint

// HasSpare tells whether m has a namespace ready.
func HasSpare(m *Manager) bool {
	m.spare.mu.Lock()
	defer m.spare.mu.Unlock()
	return m.spare.ns != nil
}
