package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// DefaultProject holds what is made without naming a project.
const DefaultProject = "default"

// findContainer finds one by id, name, "project/name" or a unique beginning of
// its id; project, when not empty, narrows the search.
func findContainer(all []*v1.Container, word, project string) (*v1.Container, error) {
	if word == "" {
		return nil, fmt.Errorf("no container named: %w", errdefs.ErrInvalidArgument)
	}
	word = strings.TrimPrefix(word, "/") // Docker's names begin so
	if p, n, ok := strings.Cut(word, "/"); ok {
		project, word = p, n
	}
	var byName, byPrefix []*v1.Container
	for _, c := range all {
		if project != "" && c.Meta.Project != project {
			continue
		}
		switch {
		case c.Meta.Id == word:
			return c, nil
		case c.Meta.Name == word:
			byName = append(byName, c)
		case len(word) >= 2 && strings.HasPrefix(c.Meta.Id, word):
			byPrefix = append(byPrefix, c)
		}
	}
	found := byName
	if len(found) == 0 {
		found = byPrefix
	}
	switch len(found) {
	case 0:
		where := ""
		if project != "" {
			where = " in project " + project
		}
		return nil, fmt.Errorf("no container %q%s: `tandem ps --all` lists them: %w", word, where, errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	}
	var names []string
	for _, c := range found {
		if len(names) < 5 {
			names = append(names, c.Meta.Project+"/"+c.Meta.Name)
		}
	}
	return nil, fmt.Errorf("%q may be %s: say which: %w", word, strings.Join(names, ", "), errdefs.ErrInvalidArgument)
}

func (s *Server) container(word, project string) (*v1.Container, error) {
	return findContainer(store.List[*v1.Container](s.store, ""), word, project)
}

// selected are the containers that a selector picks; an empty one picks none.
func (s *Server) selected(sel *v1.Selector) ([]*v1.Container, error) {
	all := store.List[*v1.Container](s.store, "")
	var out []*v1.Container
	seen := map[string]bool{}
	add := func(c *v1.Container) {
		if !seen[c.Meta.Id] {
			seen[c.Meta.Id] = true
			out = append(out, c)
		}
	}
	for _, w := range sel.GetContainers() {
		c, err := findContainer(all, w, sel.GetProject())
		if err != nil {
			return nil, err
		}
		add(c)
	}
	if sel.GetProject() != "" && len(sel.GetContainers()) == 0 {
		for _, name := range sel.GetServices() {
			if _, err := store.Get[*v1.Service](s.store, store.Key{Kind: store.Services, Project: sel.Project, Name: name}); err != nil {
				return nil, fmt.Errorf("project %s has no service %s: %w", sel.Project, name, errdefs.ErrNotFound)
			}
		}
		for _, c := range all {
			if c.Meta.Project == sel.Project && (len(sel.Services) == 0 || slices.Contains(sel.Services, c.Service) && !c.OneOff) {
				add(c)
			}
		}
		if len(sel.Services) == 0 && len(out) == 0 {
			if _, err := store.Get[*v1.Project](s.store, store.Key{Kind: store.Projects, Name: sel.Project}); err != nil {
				return nil, fmt.Errorf("no project %s: %w", sel.Project, errdefs.ErrNotFound)
			}
		}
	}
	return out, nil
}

// machine finds one by id, name or a unique beginning of its id.
func (s *Server) machine(word string) (*v1.Machine, error) {
	var found []*v1.Machine
	for _, m := range store.List[*v1.Machine](s.store, "") {
		if m.Meta.Id == word || m.Meta.Name == word {
			return m, nil
		}
		if len(word) >= 4 && strings.HasPrefix(m.Meta.Id, word) {
			found = append(found, m)
		}
	}
	if len(found) == 1 {
		return found[0], nil
	}
	return nil, fmt.Errorf("no machine %q: `tandem machine ls` lists them: %w", word, errdefs.ErrNotFound)
}

// host finds one by id or name; empty means the first that is connected.
func (s *Server) host(word string) (*v1.Host, error) {
	for _, h := range store.List[*v1.Host](s.store, "") {
		if word == "" && h.Connected || word != "" && (h.Meta.Id == word || h.Meta.Name == word) {
			return h, nil
		}
	}
	if word == "" {
		return nil, fmt.Errorf("no host is connected: start `tandem agent`: %w", errdefs.ErrUnavailable)
	}
	return nil, fmt.Errorf("no host %q: `tandem host ls` lists them: %w", word, errdefs.ErrNotFound)
}

// firstHost gives the agents of a server that has just started a moment to
// connect. It returns when one is there, and after that moment.
func (s *Server) firstHost(ctx context.Context) {
	limit := time.NewTimer(5 * time.Second)
	defer limit.Stop()
	for {
		_, changed := s.store.Changed()
		for _, id := range s.ctl.Hosts.Connected() {
			if h, err := store.ByID[*v1.Host](s.store, store.Hosts, id); err == nil && h.Connected {
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-limit.C:
			return
		case <-changed:
		}
	}
}
