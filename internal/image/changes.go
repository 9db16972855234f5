package image

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// applyChanges carries out Dockerfile instructions on an image's configuration:
// CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, STOPSIGNAL, USER, VOLUME and
// WORKDIR, the first two and HEALTHCHECK's CMD in exec ('["a", "b"]') or shell
// form ('a b').
func applyChanges(c *runConfig, changes []string) error {
	if len(changes) > 1000 {
		return fmt.Errorf("%d changes, more than 1000: %w", len(changes), errdefs.ErrInvalidArgument)
	}
	for _, line := range changes {
		line = strings.TrimSpace(strings.ReplaceAll(line, "\\\n", " "))
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		word, rest := cutWord(line)
		if err := applyChange(c, strings.ToUpper(word), rest); err != nil {
			return fmt.Errorf("change %q: %v: %w", line, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func cutWord(s string) (word, rest string) {
	i := strings.IndexAny(s, " \t\n")
	if i < 0 {
		return s, ""
	}
	return s[:i], strings.TrimSpace(s[i:])
}

var (
	signalName = regexp.MustCompile(`^(SIG)?[A-Z][A-Z0-9]*([+-][0-9]+)?$|^[0-9]{1,2}$`)
	portSpec   = regexp.MustCompile(`^([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp|sctp))?$`)
)

func applyChange(c *runConfig, word, rest string) error {
	if rest == "" && word != "CMD" && word != "ENTRYPOINT" {
		return fmt.Errorf("%s needs an argument", word)
	}
	switch word {
	case "CMD":
		c.Cmd = command(rest)
	case "ENTRYPOINT":
		c.Entrypoint = command(rest)
	case "USER":
		c.User = rest
	case "STOPSIGNAL":
		if !signalName.MatchString(strings.ToUpper(rest)) {
			return fmt.Errorf("%q is no signal", rest)
		}
		c.StopSignal = rest
	case "WORKDIR":
		words, err := splitWords(rest)
		if err != nil || len(words) != 1 {
			return fmt.Errorf("WORKDIR takes one directory")
		}
		switch {
		case strings.HasPrefix(words[0], "/"):
			c.WorkingDir = words[0]
		default:
			c.WorkingDir = strings.TrimSuffix("/"+strings.Trim(c.WorkingDir, "/"), "/") + "/" + words[0]
		}
	case "ENV":
		return pairs(rest, func(k, v string) {
			for i, e := range c.Env {
				if strings.HasPrefix(e, k+"=") {
					c.Env[i] = k + "=" + v
					return
				}
			}
			c.Env = append(c.Env, k+"="+v)
		})
	case "LABEL":
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		return pairs(rest, func(k, v string) { c.Labels[k] = v })
	case "EXPOSE":
		return expose(c, rest)
	case "VOLUME":
		list, ok := jsonList(rest)
		if !ok {
			var err error
			if list, err = splitWords(rest); err != nil {
				return err
			}
		}
		if c.Volumes == nil {
			c.Volumes = map[string]struct{}{}
		}
		for _, v := range list {
			if !strings.HasPrefix(v, "/") {
				return fmt.Errorf("volume %q must be an absolute path", v)
			}
			c.Volumes[v] = struct{}{}
		}
	case "HEALTHCHECK":
		return healthcheck(c, rest)
	default:
		return fmt.Errorf("unknown instruction %s; known are CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR", word)
	}
	return nil
}

// jsonList reads the exec form.
func jsonList(s string) ([]string, bool) {
	if !strings.HasPrefix(s, "[") {
		return nil, false
	}
	list := []string{}
	if json.Unmarshal([]byte(s), &list) != nil {
		return nil, false
	}
	return list, true
}

// command reads the exec or the shell form. As Docker does, a broken exec form
// is taken as shell.
func command(s string) []string {
	if list, ok := jsonList(s); ok {
		return list
	}
	if s == "" {
		return nil
	}
	return []string{"/bin/sh", "-c", s}
}

func expose(c *runConfig, rest string) error {
	if c.ExposedPorts == nil {
		c.ExposedPorts = map[string]struct{}{}
	}
	for _, spec := range strings.Fields(rest) {
		m := portSpec.FindStringSubmatch(strings.ToLower(spec))
		if m == nil {
			return fmt.Errorf("%q is no port; write 80, 80/tcp or 8000-8010/udp", spec)
		}
		from, _ := strconv.Atoi(m[1])
		to := from
		if m[2] != "" {
			to, _ = strconv.Atoi(m[2])
		}
		if from < 1 || to > 65535 || to < from || to-from > 1000 {
			return fmt.Errorf("%q is no port or range of at most 1000", spec)
		}
		proto := m[3]
		if proto == "" {
			proto = "tcp"
		}
		for p := from; p <= to; p++ {
			c.ExposedPorts[fmt.Sprintf("%d/%s", p, proto)] = struct{}{}
		}
	}
	return nil
}

// pairs reads "k=v k2='v 2'", or the old "k v with blanks".
func pairs(rest string, set func(k, v string)) error {
	first, value := cutWord(rest)
	if !strings.Contains(first, "=") {
		if value == "" {
			return fmt.Errorf("%q has no value", first)
		}
		set(first, value)
		return nil
	}
	words, err := splitWords(rest)
	if err != nil {
		return err
	}
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		if !ok || k == "" {
			return fmt.Errorf("%q is not NAME=VALUE", w)
		}
		set(k, v)
	}
	return nil
}

// splitWords splits at blanks outside of quotes and takes quotes and backslashes
// away, as a Dockerfile does. Variables are not expanded.
func splitWords(s string) ([]string, error) {
	var out []string
	var b strings.Builder
	in, quote := false, byte(0)
	for i := 0; i < len(s); i++ {
		ch := s[i]
		switch {
		case ch == '\\' && quote != '\'' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
			in = true
		case quote != 0:
			if ch == quote {
				quote = 0
			} else {
				b.WriteByte(ch)
			}
		case ch == '\'' || ch == '"':
			quote, in = ch, true
		case ch == ' ' || ch == '\t' || ch == '\n':
			if in {
				out = append(out, b.String())
				b.Reset()
				in = false
			}
		default:
			b.WriteByte(ch)
			in = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("a quote is not closed")
	}
	if in {
		out = append(out, b.String())
	}
	return out, nil
}

func healthcheck(c *runConfig, rest string) error {
	if strings.EqualFold(rest, "NONE") {
		c.Healthcheck = &healthConfig{Test: []string{"NONE"}}
		return nil
	}
	h := &healthConfig{}
	fs := flag.NewFlagSet("HEALTHCHECK", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	interval := fs.Duration("interval", 0, "")
	timeout := fs.Duration("timeout", 0, "")
	startPeriod := fs.Duration("start-period", 0, "")
	startInterval := fs.Duration("start-interval", 0, "")
	retries := fs.Int("retries", 0, "")
	for strings.HasPrefix(rest, "--") {
		var option string
		option, rest = cutWord(rest)
		if err := fs.Parse([]string{option}); err != nil {
			return err
		}
	}
	for _, d := range []time.Duration{*interval, *timeout, *startPeriod, *startInterval} {
		if d != 0 && d < time.Millisecond {
			return fmt.Errorf("times must be at least 1ms")
		}
	}
	if *retries < 0 || *retries > 1000 {
		return fmt.Errorf("retries must be 0 to 1000")
	}
	word, cmd := cutWord(rest)
	if !strings.EqualFold(word, "CMD") || cmd == "" {
		return fmt.Errorf("write HEALTHCHECK [options] CMD command, or HEALTHCHECK NONE")
	}
	if list, ok := jsonList(cmd); ok {
		h.Test = append([]string{"CMD"}, list...)
	} else {
		h.Test = []string{"CMD-SHELL", cmd}
	}
	h.Interval, h.Timeout, h.StartPeriod = int64(*interval), int64(*timeout), int64(*startPeriod)
	h.StartInterval, h.Retries = int64(*startInterval), int32(*retries)
	c.Healthcheck = h
	return nil
}
