package guest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
)

// kmsgHandler writes log records to the kernel's log, warnings and errors with a
// priority that reaches the serial console also when booted with "quiet": the
// host keeps those for the day that the guest dies. (The console is slow under
// emulation, so the rest stays in the ring.)
type kmsgHandler struct {
	mu    *sync.Mutex
	f     *os.File
	who   string
	attrs string
}

// newLogger logs as who ("init", "agent") to /dev/kmsg.
func newLogger(who string) *slog.Logger {
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		f = os.Stderr
	}
	return slog.New(&kmsgHandler{mu: new(sync.Mutex), f: f, who: who})
}

func (h *kmsgHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

func (h *kmsgHandler) Handle(_ context.Context, r slog.Record) error {
	priority := 6
	if r.Level >= slog.LevelWarn {
		priority = 3
	}
	var b strings.Builder
	fmt.Fprintf(&b, "<%d>tandem-%s: %s%s", priority, h.who, r.Message, h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		fmt.Fprintf(&b, " %s=%q", a.Key, a.Value.String())
		return true
	})
	line := strings.ReplaceAll(b.String(), "\n", " ")
	if len(line) > 900 { // the kernel's limit is 1 KiB a record
		line = line[:900] + "..."
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := h.f.WriteString(line + "\n")
	return err
}

func (h *kmsgHandler) WithAttrs(as []slog.Attr) slog.Handler {
	n := *h
	for _, a := range as {
		n.attrs += fmt.Sprintf(" %s=%q", a.Key, a.Value.String())
	}
	return &n
}

func (h *kmsgHandler) WithGroup(string) slog.Handler { return h }
