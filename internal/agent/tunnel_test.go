package agent

import (
	"net/http"
	"testing"

	"tandem/internal/rpc"
)

// tunnelHandler is a server that accepts agents with the token "secret".
func tunnelHandler(t *testing.T, tunnels chan<- *rpc.Tunnel) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tun, err := rpc.AcceptTunnel(w, r, "secret")
		if err != nil {
			t.Errorf("tunnel: %v", err)
			return
		}
		tunnels <- tun
		<-tun.Done()
	})
}
