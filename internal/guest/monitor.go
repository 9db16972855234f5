package guest

import (
	"context"
	"log/slog"
	"time"

	"tandem/internal/guest/layout"
	"tandem/internal/runtime/monitor"
)

// serveMonitor hosts the container monitor. It must not take PID 1 with it.
func serveMonitor(log *slog.Logger) {
	for {
		err := monitor.Serve(context.Background(), monitor.Options{
			Socket: layout.MonitorSocket, Dir: layout.MonitorDir, Logger: log,
		})
		log.Error("the container monitor ended; starting it again", "error", err)
		time.Sleep(time.Second)
	}
}
