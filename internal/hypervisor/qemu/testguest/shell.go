package testguest

import (
	"bufio"
	"context"
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
// ctx ends. The conn is closed by Close.
func NewShell(ctx context.Context, conn net.Conn) (*Shell, error) {
	s := &Shell{conn: conn, r: bufio.NewReader(conn)}
	// What is written before the guest opened its port waits in the port.
	out, err := s.Run(ctx, "echo hel''lo")
	if err != nil || !strings.Contains(out, "hello") {
		_ = conn.Close()
		return nil, fmt.Errorf("test guest answered %q: %w", out, err)
	}
	return s, nil
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
