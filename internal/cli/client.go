package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"strings"

	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/rpc"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
)

// client is every service of the API; each is made when it is asked for.
type client struct {
	h *http.Client
	o []connect.ClientOption
}

func (c *client) projects() tandemv1connect.ProjectServiceClient {
	return tandemv1connect.NewProjectServiceClient(c.h, rpc.BaseURL, c.o...)
}

func (c *client) containers() tandemv1connect.ContainerServiceClient {
	return tandemv1connect.NewContainerServiceClient(c.h, rpc.BaseURL, c.o...)
}

func (c *client) machines() tandemv1connect.MachineServiceClient {
	return tandemv1connect.NewMachineServiceClient(c.h, rpc.BaseURL, c.o...)
}

func (c *client) images() tandemv1connect.ImageServiceClient {
	return tandemv1connect.NewImageServiceClient(c.h, rpc.BaseURL, c.o...)
}

func (c *client) volumes() tandemv1connect.VolumeServiceClient {
	return tandemv1connect.NewVolumeServiceClient(c.h, rpc.BaseURL, c.o...)
}

func (c *client) system() tandemv1connect.SystemServiceClient {
	return tandemv1connect.NewSystemServiceClient(c.h, rpc.BaseURL, c.o...)
}

func (c *client) state() tandemv1connect.StateServiceClient {
	return tandemv1connect.NewStateServiceClient(c.h, rpc.BaseURL, c.o...)
}

// api connects on first use.
func (a *app) api() (*client, error) {
	if a.c != nil {
		return a.c, nil
	}
	path, ok := strings.CutPrefix(a.socket, "unix://")
	if !ok {
		path, ok = a.socket, strings.HasPrefix(a.socket, "/")
	}
	if !ok {
		return nil, usageError("--host %q: give unix:///path/to/tandem.sock", a.socket)
	}
	h := rpc.NewClient(func(ctx context.Context) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		switch {
		case errors.Is(err, fs.ErrPermission):
			return nil, fmt.Errorf("no permission for the server at %s: %w", path, errdefs.ErrPermissionDenied)
		case err != nil:
			return nil, fmt.Errorf("no server at %s: %w", path, errdefs.ErrUnavailable)
		}
		return c, nil
	})
	a.c = &client{h, rpc.ClientOptions()}
	return a.c, nil
}
