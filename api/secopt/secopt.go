// Package secopt reads Docker's security options (`--security-opt`, `security_opt`),
// for the command line, the Compose files' reader, the server and the runtime alike.
// A client reads a seccomp profile's file and sends its text:
//
//	o, err := secopt.Load("seccomp=profile.json", filepath.Abs) // seccomp={"defaultAction":...}
//
// and everybody else checks what came:
//
//	err := secopt.Check(o)
package secopt

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
)

// What a seccomp profile may have at most.
const (
	MaxProfile = 1 << 20 // bytes
	maxNames   = 10_000  // system calls in all its rules
	maxArches  = 100
)

// Split is an option's name and value; Docker lets them be separated by = and, in old
// files, by a colon.
func Split(option string) (name, value string) {
	name, value, ok := strings.Cut(option, "=")
	if !ok {
		name, value, _ = strings.Cut(option, ":")
	}
	return name, value
}

// Load is the option with the text of its profile in the place of the file that it
// names; other options stay as they are. resolve makes a path absolute.
func Load(option string, resolve func(path string) (string, error)) (string, error) {
	name, value := Split(option)
	if name != "seccomp" || value == "" || value == "unconfined" || value == "builtin" || isText(value) {
		return option, nil
	}
	path, err := resolve(value)
	if err != nil {
		return "", fmt.Errorf("seccomp profile %s: %w", value, err)
	}
	text, err := read(path)
	if err == nil {
		err = CheckProfile(string(text))
	}
	var compact bytes.Buffer
	if err == nil {
		err = json.Compact(&compact, text)
	}
	if err != nil {
		return "", fmt.Errorf("seccomp profile %s: %w", value, err)
	}
	return "seccomp=" + compact.String(), nil
}

func read(path string) ([]byte, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, errors.New("there is no such file")
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("that is not a regular file")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxProfile+1)) // the check says that it is too long
}

func isText(value string) bool { return strings.HasPrefix(strings.TrimSpace(value), "{") }

// Check says what is wrong with an option as it is sent to a server; nil: nothing.
func Check(option string) error {
	name, value := Split(option)
	switch {
	case name == "no-new-privileges" && slices.Contains([]string{"", "true", "false"}, value):
	case name == "seccomp" && isText(value):
		if err := CheckProfile(value); err != nil {
			return fmt.Errorf("seccomp profile: %w", err)
		}
	case name == "seccomp" && slices.Contains([]string{"", "unconfined", "builtin"}, value):
	case name == "seccomp":
		return fmt.Errorf("security option %.80q: the text of the profile is wanted, not a file's name", option)
	case name == "systempaths" && value == "unconfined":
	case name == "apparmor" || name == "label": // neither is on: nothing to take away
		if value != "unconfined" && value != "disable" {
			return fmt.Errorf("security option %.80q: AppArmor profiles and SELinux labels are not supported", option)
		}
	default:
		return fmt.Errorf("security option %.80q is not known", option)
	}
	return nil
}

// profile is Docker's format, as far as it is checked here.
type profile struct {
	DefaultAction    string   `json:"defaultAction"`
	Architectures    []string `json:"architectures"`
	ListenerPath     string   `json:"listenerPath"`
	ListenerMetadata string   `json:"listenerMetadata"`
	ArchMap          []struct {
		SubArchitectures []string `json:"subArchitectures"`
	} `json:"archMap"`
	Syscalls []*rule `json:"syscalls"`
}

type rule struct {
	Name   string   `json:"name"` // of old profiles
	Names  []string `json:"names"`
	Action string   `json:"action"`
	Args   []struct {
		Index uint   `json:"index"`
		Op    string `json:"op"`
	} `json:"args"`
	Includes filter `json:"includes"`
	Excludes filter `json:"excludes"`
}

type filter struct {
	MinKernel string `json:"minKernel"`
}

var (
	// SCMP_ACT_NOTIFY is missing: it would have the runtime hand system calls to a
	// socket of the host, or of the machine.
	actions = []string{"SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_TRAP", "SCMP_ACT_ERRNO", "SCMP_ACT_TRACE", "SCMP_ACT_ALLOW", "SCMP_ACT_LOG"}
	ops     = []string{"SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"}
	kernel  = regexp.MustCompile(`^[0-9]{1,2}\.[0-9]{1,2}$`)
)

// CheckProfile says what is wrong with a seccomp profile in Docker's format, so that
// one that would be no filter at all, or that the runtime can't read, is refused.
func CheckProfile(text string) error {
	if len(text) > MaxProfile {
		return fmt.Errorf("more than %d bytes", MaxProfile)
	}
	var p profile
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return fmt.Errorf("not a profile in Docker's format: %w", err)
	}
	if p.DefaultAction == "" {
		return errors.New("defaultAction is missing; seccomp=unconfined is no filter")
	}
	if err := action(p.DefaultAction); err != nil {
		return fmt.Errorf("defaultAction: %w", err)
	}
	if p.ListenerPath != "" || p.ListenerMetadata != "" {
		return errors.New("listenerPath: listeners are not supported")
	}
	if len(p.Architectures) > 0 && len(p.ArchMap) > 0 {
		return errors.New("it has architectures and archMap: give one of both")
	}
	arches := len(p.Architectures) + len(p.ArchMap)
	for _, a := range p.ArchMap {
		arches += len(a.SubArchitectures)
	}
	if arches > maxArches {
		return fmt.Errorf("%d architectures, at most %d", arches, maxArches)
	}
	names := 0
	for i, r := range p.Syscalls {
		if err := r.check(); err != nil {
			return fmt.Errorf("syscalls[%d]: %w", i, err)
		}
		if names += max(len(r.Names), 1); names > maxNames {
			return fmt.Errorf("more than %d system calls", maxNames)
		}
	}
	return nil
}

func (r *rule) check() error {
	switch {
	case r == nil || r.Name == "" && len(r.Names) == 0:
		return errors.New("names are missing")
	case r.Name != "" && len(r.Names) > 0:
		return errors.New("it has name and names: give one of both")
	case slices.Contains(r.Names, ""):
		return errors.New("a name is empty")
	case len(r.Args) > 6:
		return fmt.Errorf("%d args, at most 6", len(r.Args))
	}
	if err := action(r.Action); err != nil {
		return fmt.Errorf("action: %w", err)
	}
	for _, a := range r.Args {
		if a.Index > 5 || !slices.Contains(ops, a.Op) {
			return fmt.Errorf("args: index %d with op %.40q: give 0 to 5, and one of %s", a.Index, a.Op, strings.Join(ops, ", "))
		}
	}
	for _, k := range []string{r.Includes.MinKernel, r.Excludes.MinKernel} {
		if k != "" && !kernel.MatchString(k) {
			return fmt.Errorf("minKernel %.20q: give it as 4.8", k)
		}
	}
	return nil
}

func action(a string) error {
	if !slices.Contains(actions, a) {
		return fmt.Errorf("%.40q is not one of %s", a, strings.Join(actions, ", "))
	}
	return nil
}
