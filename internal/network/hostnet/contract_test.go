package hostnet_test

import (
	"log/slog"
	"testing"

	"tandem/internal/network"
	"tandem/internal/network/hostnet"
	"tandem/internal/network/networktest"
)

func TestContract(t *testing.T) {
	networktest.Run(t, func(t *testing.T) network.Network {
		clean(t)
		return open(t, hostnet.Options{Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	})
}
