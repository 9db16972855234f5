package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"sort"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	v1 "tandem/api/tandem/v1"
)

// configFile is the part of an OCI or Docker image configuration that is used.
// Field order is that of the files Import writes.
type configFile struct {
	Created      *time.Time    `json:"created,omitempty"`
	Architecture string        `json:"architecture"`
	Variant      string        `json:"variant,omitempty"`
	OS           string        `json:"os"`
	Config       runConfig     `json:"config"`
	RootFS       rootFS        `json:"rootfs"`
	History      []historyItem `json:"history,omitempty"`
}

type runConfig struct {
	User         string              `json:"User,omitempty"`
	ExposedPorts map[string]struct{} `json:"ExposedPorts,omitempty"`
	Env          []string            `json:"Env,omitempty"`
	Entrypoint   stringList          `json:"Entrypoint,omitempty"`
	Cmd          stringList          `json:"Cmd,omitempty"`
	Volumes      map[string]struct{} `json:"Volumes,omitempty"`
	WorkingDir   string              `json:"WorkingDir,omitempty"`
	Labels       map[string]string   `json:"Labels,omitempty"`
	OnBuild      []string            `json:"OnBuild,omitempty"`
	StopSignal   string              `json:"StopSignal,omitempty"`
	Healthcheck  *healthConfig       `json:"Healthcheck,omitempty"`
}

// healthConfig has times in nanoseconds.
type healthConfig struct {
	Test          []string `json:"Test,omitempty"`
	Interval      int64    `json:"Interval,omitempty"`
	Timeout       int64    `json:"Timeout,omitempty"`
	StartPeriod   int64    `json:"StartPeriod,omitempty"`
	StartInterval int64    `json:"StartInterval,omitempty"`
	Retries       int32    `json:"Retries,omitempty"`
}

type rootFS struct {
	Type    string   `json:"type"`
	DiffIDs []string `json:"diff_ids"`
}

type historyItem struct {
	Created   *time.Time `json:"created,omitempty"`
	CreatedBy string     `json:"created_by,omitempty"`
	Comment   string     `json:"comment,omitempty"`
}

// stringList also reads a single string, as old images have it.
type stringList []string

// UnmarshalJSON reads a list of strings, or one string.
func (l *stringList) UnmarshalJSON(b []byte) error {
	var list []string
	if err := json.Unmarshal(b, &list); err == nil {
		*l = list
		return nil
	}
	var one string
	if err := json.Unmarshal(b, &one); err != nil {
		return err
	}
	*l = stringList{one}
	return nil
}

func hashOf(raw []byte) string {
	sum := sha256.Sum256(raw)
	return "sha256:" + hex.EncodeToString(sum[:])
}

var platformWord = regexp.MustCompile(`^[a-z0-9_.-]{0,32}$`)

func badConfig(format string, args ...any) error {
	return fmt.Errorf("image config: %s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// decodeConfig checks a configuration: it comes from strangers.
func decodeConfig(raw []byte) (*configFile, error) {
	if len(raw) > maxConfigBytes {
		return nil, badConfig("%d bytes, more than %d", len(raw), maxConfigBytes)
	}
	var c configFile
	if err := json.Unmarshal(raw, &c); err != nil {
		return nil, badConfig("%v", err)
	}
	if c.OS != "" && c.OS != "linux" {
		return nil, badConfig("operating system %q; only linux images run here", c.OS)
	}
	if !platformWord.MatchString(c.Architecture) || !platformWord.MatchString(c.Variant) {
		return nil, badConfig("architecture %q", c.Architecture)
	}
	if c.RootFS.Type != "" && c.RootFS.Type != "layers" {
		return nil, badConfig("root file system of type %q", c.RootFS.Type)
	}
	if len(c.RootFS.DiffIDs) > maxLayers {
		return nil, badConfig("%d layers, more than %d", len(c.RootFS.DiffIDs), maxLayers)
	}
	for _, d := range c.RootFS.DiffIDs {
		if !fullID.MatchString(d) {
			return nil, badConfig("%q is no sha256 digest", d)
		}
	}
	r := &c.Config
	texts := [][]string{r.Env, r.Entrypoint, r.Cmd, {r.User, r.WorkingDir, r.StopSignal}}
	if r.Healthcheck != nil {
		texts = append(texts, r.Healthcheck.Test)
		h := r.Healthcheck
		if h.Interval < 0 || h.Timeout < 0 || h.StartPeriod < 0 || h.StartInterval < 0 || h.Retries < 0 {
			return nil, badConfig("health check with a negative time")
		}
	}
	for _, list := range texts {
		for _, t := range list {
			if strings.IndexByte(t, 0) >= 0 {
				return nil, badConfig("a zero byte in %q", t)
			}
		}
	}
	return &c, nil
}

// parseConfig turns a configuration into the API's image, without id, names and
// size.
func parseConfig(raw []byte) (*v1.Image, error) {
	c, err := decodeConfig(raw)
	if err != nil {
		return nil, err
	}
	r := &c.Config
	img := &v1.Image{
		Architecture: c.Architecture, Os: c.OS, Layers: c.RootFS.DiffIDs,
		Config: &v1.ImageConfig{
			Entrypoint: r.Entrypoint, Command: r.Cmd, Env: r.Env, User: r.User, WorkingDir: r.WorkingDir,
			Labels: r.Labels, Volumes: keys(r.Volumes), ExposedPorts: keys(r.ExposedPorts), StopSignal: r.StopSignal,
		},
	}
	if c.Created != nil {
		if ts := timestamppb.New(*c.Created); ts.IsValid() {
			img.CreatedAt = ts
		}
	}
	if h := r.Healthcheck; h != nil {
		img.Config.Healthcheck = &v1.HealthCheck{
			Test: h.Test, Retries: h.Retries,
			Interval: duration(h.Interval), Timeout: duration(h.Timeout),
			StartPeriod: duration(h.StartPeriod), StartInterval: duration(h.StartInterval),
		}
	}
	return img, nil
}

func duration(ns int64) *durationpb.Duration {
	if ns == 0 {
		return nil
	}
	return durationpb.New(time.Duration(ns))
}

func keys(m map[string]struct{}) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

// hostPlatform checks that an image can run where it is asked for. An image that
// names no architecture is taken at its word.
func hostPlatform(c *configFile, want string) error {
	_, arch, _ := strings.Cut(want, "/")
	arch, _, _ = strings.Cut(arch, "/")
	if c.Architecture == "" || c.Architecture == arch {
		return nil
	}
	return fmt.Errorf("the image is for linux/%s, not for %s: %w", c.Architecture, want, errdefs.ErrFailedPrecondition)
}
