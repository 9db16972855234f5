package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"

	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/rpc"

	"github.com/containerd/errdefs"
)

// client is every service of the API.
type client struct {
	projects   tandemv1connect.ProjectServiceClient
	containers tandemv1connect.ContainerServiceClient
	machines   tandemv1connect.MachineServiceClient
	images     tandemv1connect.ImageServiceClient
	volumes    tandemv1connect.VolumeServiceClient
	system     tandemv1connect.SystemServiceClient
	state      tandemv1connect.StateServiceClient
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
	o := rpc.ClientOptions()
	a.c = &client{
		projects:   tandemv1connect.NewProjectServiceClient(h, rpc.BaseURL, o...),
		containers: tandemv1connect.NewContainerServiceClient(h, rpc.BaseURL, o...),
		machines:   tandemv1connect.NewMachineServiceClient(h, rpc.BaseURL, o...),
		images:     tandemv1connect.NewImageServiceClient(h, rpc.BaseURL, o...),
		volumes:    tandemv1connect.NewVolumeServiceClient(h, rpc.BaseURL, o...),
		system:     tandemv1connect.NewSystemServiceClient(h, rpc.BaseURL, o...),
		state:      tandemv1connect.NewStateServiceClient(h, rpc.BaseURL, o...),
	}
	return a.c, nil
}
