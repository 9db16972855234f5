package compose

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/tree"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"

	v1 "tandem/api/tandem/v1"
)

// Limits on what is read; files beyond them are refused.
const (
	MaxFile     = 1 << 20 // bytes of a Compose file, and of a secret or config
	maxServices = 10000
	maxReplicas = 10000
	maxNodes    = 200000 // YAML nodes, aliases followed
)

// Options says what to load. The zero value finds compose.yaml (or docker-compose.yml,
// with overrides) in the current directory or above it, without any environment.
type Options struct {
	// Files are Compose files, later ones over earlier ones; "-" is standard input.
	// Empty: COMPOSE_FILE, or the default names.
	Files []string
	// WorkingDir is what relative paths start from; empty: the first file's directory.
	WorkingDir string
	// ProjectName; empty: COMPOSE_PROJECT_NAME, name: in a file, or the directory's name.
	ProjectName string
	// Profiles to activate; "*" is all of them. Empty: COMPOSE_PROFILES.
	Profiles []string
	// EnvFiles are used instead of .env for interpolation.
	EnvFiles []string
	// Env is the environment for interpolation, "K=V"; callers pass os.Environ().
	Env []string
	// IgnoreBuild takes services that have both build and image, with a warning.
	// Without it, build is refused.
	IgnoreBuild bool
}

// Project is what the files say.
type Project struct {
	// Request is complete but for the flags of `up` (wait, plan_only, ...).
	Request *v1.ApplyProjectRequest
	// Warnings name what has no effect here, each with its place.
	Warnings []string
}

// Load reads Compose files. All problems are reported at once, see Error.
func Load(ctx context.Context, o Options) (p *Project, err error) {
	defer func() {
		r := recover()
		if u, ok := r.(unfit); ok {
			p, err = nil, fmt.Errorf("read Compose files: %w", u.error)
		} else if r != nil { // the reader met a file that it did not expect
			p, err = nil, fmt.Errorf("read Compose files: malformed model (%v): %w", r, errdefs.ErrInvalidArgument)
		}
	}()
	r := &report{}
	project, model, err := read(ctx, o, r)
	if err != nil {
		return nil, err
	}
	w := &walker{report: r, ignoreBuild: o.IgnoreBuild}
	w.model(project, model)
	c := &converter{report: r, project: project}
	request := c.convert()
	if err := r.err(project.Name); err != nil {
		return nil, err
	}
	return &Project{Request: request, Warnings: r.warned()}, nil
}

// read lets compose-go load the files; it returns its project and the merged model.
func read(ctx context.Context, o Options, r *report) (*types.Project, map[string]any, error) {
	model := map[string]any{}
	var patterns []loader.UnsupportedAttributePattern
	for _, k := range []string{"services", "networks", "volumes", "secrets", "configs", "models", "jobs", "x-tandem"} {
		patterns = append(patterns, loader.UnsupportedAttributePattern{Path: tree.NewPath(k), Detect: func(v any) bool {
			model[k] = clone(v)
			return false
		}})
	}
	known := []tree.Path{"name", "version", "include"}
	var fresh []Problem
	found := func(list []loader.UnsupportedAttribute) {
		for _, a := range list {
			fresh = append(fresh, Problem{a.Path.String(), "this field is not supported"})
		}
	}
	for _, k := range []string{"services", "networks", "volumes", "secrets", "configs", "models", "jobs"} {
		known = append(known, tree.NewPath(k))
	}
	done := quiet(r)
	defer done()
	g := &guard{}
	options, err := cli.NewProjectOptions(o.Files,
		cli.WithWorkingDirectory(o.WorkingDir),
		cli.WithEnv(o.Env),
		cli.WithEnvFiles(o.EnvFiles...),
		cli.WithDotEnv,
		cli.WithConfigFileEnv,
		cli.WithDefaultConfigPath,
		cli.WithEnvFiles(o.EnvFiles...), // the directory may have changed by now
		cli.WithDotEnv,
		cli.WithDefaultProfiles(o.Profiles...),
		cli.WithName(o.ProjectName),
		cli.WithoutUnnecessaryResources,
		cli.WithoutEnvironmentResolution,
		cli.WithoutLabelsResolution,
		cli.WithResourceLoader(g),
		cli.WithLoadOptions(
			func(l *loader.Options) { l.MaxNodeVisits = maxNodes },
			loader.WithUnsupportedAttributesCheck(patterns, found),
			loader.WithSupportedAttributes(known, nil),
		),
	)
	if err != nil {
		return nil, nil, classify(err)
	}
	if len(options.ConfigPaths) == 0 {
		return nil, nil, fmt.Errorf("no compose.yaml or docker-compose.yml here or in a directory above; name one with -f: %w", errdefs.ErrNotFound)
	}
	for _, f := range options.ConfigPaths {
		if f == "-" {
			continue
		}
		if err := checkFile(f); err != nil {
			return nil, nil, err
		}
		g.dirs = append(g.dirs, filepath.Dir(f))
	}
	if o.WorkingDir != "" {
		g.dirs = append(g.dirs, options.WorkingDir)
	}
	project, err := options.LoadProject(ctx)
	if err != nil {
		return nil, nil, classify(err)
	}
	if project, err = resolveFiles(project); err != nil {
		return nil, nil, classify(err)
	}
	r.problems = append(r.problems, fresh...)
	if len(project.Services) > maxServices {
		return nil, nil, fmt.Errorf("project %s has %d services, more than %d: %w", project.Name, len(project.Services), maxServices, errdefs.ErrInvalidArgument)
	}
	return project, model, nil
}

// classify gives compose-go's errors a class of ours.
func classify(err error) error {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("read Compose files: %w", err)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("read Compose files: %w (%w)", err, errdefs.ErrNotFound)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("read Compose files: %w (%w)", err, errdefs.ErrPermissionDenied)
	}
	return fmt.Errorf("read Compose files: %w (%w)", err, errdefs.ErrInvalidArgument)
}

// model reports the fields that were not decided to be taken, in what is active.
func (w *walker) model(p *types.Project, model map[string]any) {
	active := map[string]func(string) bool{
		"services": func(n string) bool { _, ok := p.Services[n]; return ok },
		"networks": func(n string) bool { _, ok := p.Networks[n]; return ok },
		"volumes":  func(n string) bool { _, ok := p.Volumes[n]; return ok },
		"secrets":  func(n string) bool { _, ok := p.Secrets[n]; return ok },
		"configs":  func(n string) bool { _, ok := p.Configs[n]; return ok },
	}
	for k, keep := range active {
		if m, ok := model[k].(map[string]any); ok {
			for _, name := range sortedKeys(m) {
				if !keep(name) {
					delete(m, name)
				}
			}
		}
	}
	w.walk(decisions(), "", "", model)
}

var logMu sync.Mutex

// quiet turns what compose-go logs into warnings. Its logger is one for the whole
// process; loads take turns.
func quiet(r *report) (restore func()) {
	logMu.Lock()
	log := logrus.StandardLogger()
	out, hooks := log.Out, log.Hooks
	log.SetOutput(io.Discard)
	log.ReplaceHooks(logrus.LevelHooks{logrus.WarnLevel: {hook{r}}})
	return func() {
		log.SetOutput(out)
		log.ReplaceHooks(hooks)
		logMu.Unlock()
	}
}

type hook struct{ r *report }

func (hook) Levels() []logrus.Level { return []logrus.Level{logrus.WarnLevel} }

func (h hook) Fire(e *logrus.Entry) error {
	if strings.Contains(e.Message, "attribute `version` is obsolete") {
		return nil // said once a process only: not reproducible, and harmless
	}
	h.r.warnings = append(h.r.warnings, e.Message)
	return nil
}

// clone copies a model: compose-go goes on changing its own.
func clone(v any) any {
	switch v := v.(type) {
	case map[string]any:
		m := make(map[string]any, len(v))
		for k, e := range v {
			m[k] = clone(e)
		}
		return m
	case []any:
		l := make([]any, len(v))
		for i, e := range v {
			l[i] = clone(e)
		}
		return l
	}
	return v
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
