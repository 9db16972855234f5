package testguest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"
)

// Shell runs commands in the guest over the agent port.
type Shell struct {
	conn net.Conn
	r    *bufio.Reader
}

// NewShell speaks on a machine's channel. It waits until the guest answers, or
// ctx ends. The conn is closed by Close. What is sent while the guest still
// closes its port after the connection before is lost, so it asks repeatedly.
func NewShell(ctx context.Context, conn net.Conn) (*Shell, error) {
	s := &Shell{conn: conn, r: bufio.NewReader(conn)}
	var seen string
	for n := 0; ; n++ {
		token := fmt.Sprintf("hello-%d-%d", time.Now().UnixNano(), n)
		if _, err := fmt.Fprintf(conn, "echo %s\n", token); err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("test guest: %w", err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(2 * time.Second))
		for {
			part, err := s.r.ReadString('\n')
			seen += part
			// Its own answer is the last of those under way.
			if i := strings.Index(seen, token); i >= 0 && strings.HasSuffix(seen[i:], "\n\x010\n") {
				return s, nil
			}
			if err == nil {
				continue
			}
			var ne net.Error
			if ctx.Err() != nil || !errors.As(err, &ne) || !ne.Timeout() {
				_ = conn.Close()
				return nil, fmt.Errorf("test guest does not answer: %w: %v", err, context.Cause(ctx))
			}
			break // ask again
		}
	}
}

// Run runs one line of shell; a status other than 0 is an error.
func (s *Shell) Run(ctx context.Context, line string) (string, error) {
	if d, ok := ctx.Deadline(); ok {
		_ = s.conn.SetDeadline(d)
	} else {
		_ = s.conn.SetDeadline(time.Time{})
	}
	stop := context.AfterFunc(ctx, func() { _ = s.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := fmt.Fprintln(s.conn, line); err != nil {
		return "", err
	}
	var out strings.Builder
	for {
		l, err := s.r.ReadString('\n')
		if err != nil {
			return out.String(), fmt.Errorf("guest: %q: %w", line, err)
		}
		if rest, ok := strings.CutPrefix(l, "\x01"); ok {
			text := strings.TrimSpace(out.String())
			if rc, err := strconv.Atoi(strings.TrimSpace(rest)); err != nil || rc != 0 {
				return text, fmt.Errorf("guest: %q: status %s: %s", line, strings.TrimSpace(rest), text)
			}
			return text, nil
		}
		out.WriteString(l)
	}
}

// Close ends the connection; the guest waits for the next.
func (s *Shell) Close() error { return s.conn.Close() }
