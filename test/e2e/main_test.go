package e2e

import (
	"os"
	"testing"

	"tandem/test/host"
)

func TestMain(m *testing.M) {
	host.MaybeInit()
	os.Exit(m.Run())
}
