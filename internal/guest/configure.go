package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
)

const (
	minEntropy = 64
	maxEntropy = 4096
)

var (
	machineIDPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)
	hostnamePattern  = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,62}[a-zA-Z0-9])?$`)
	// earliest is a time that no host's clock shows any more.
	earliest = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
)

// Configure gives the guest its identity: random state, clock, names, disk.
//
// A clone is a guest that was sealed by Quiesce: it gets a guest id of its own
// here, after its random generator was reseeded. The agent process itself goes
// on: Go's crypto/rand asks the kernel each time (6.1 has no vDSO generator), so
// there is no random state in the process that a secret could come from.
func (s *service) Configure(ctx context.Context, r *connect.Request[v1.ConfigureRequest]) (*connect.Response[v1.ConfigureResponse], error) {
	m := r.Msg
	if err := checkConfigure(m); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.id.configured() && s.id.MachineID != m.MachineId {
		return nil, fmt.Errorf("this guest is machine %s and cannot become %s; start another one: %w",
			s.id.MachineID, m.MachineId, errdefs.ErrFailedPrecondition)
	}
	if s.id.configured() && s.id.ScratchSerial != m.ScratchSerial {
		return nil, fmt.Errorf("machine %s has scratch disk %q and cannot change to %q while it runs: %w",
			m.MachineId, s.id.ScratchSerial, m.ScratchSerial, errdefs.ErrFailedPrecondition)
	}
	if err := reseed(m.Entropy); err != nil {
		return nil, fmt.Errorf("reseed the random generator: %w", err)
	}
	if err := setClock(m.Now.AsTime()); err != nil {
		return nil, fmt.Errorf("set the clock: %w", err)
	}
	if err := setNames(m.MachineId, m.Hostname); err != nil {
		return nil, err
	}
	if err := mountScratch(ctx, m.ScratchSerial); err != nil {
		return nil, err
	}
	next := s.id
	if !next.configured() {
		next.GuestID = newGuestID(m.Entropy)
	}
	next.MachineID, next.Hostname, next.ScratchSerial, next.Sealed = m.MachineId, m.Hostname, m.ScratchSerial, false
	if err := next.save(); err != nil {
		return nil, err
	}
	s.id = next
	s.containers.start(s.ctx)
	return connect.NewResponse(&v1.ConfigureResponse{GuestId: next.GuestID}), nil
}

func checkConfigure(m *v1.ConfigureRequest) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("configure: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...)
	}
	switch {
	case !machineIDPattern.MatchString(m.MachineId):
		return bad("machine id %q", m.MachineId)
	case m.Hostname != "" && !hostnamePattern.MatchString(m.Hostname):
		return bad("hostname %q", m.Hostname)
	case len(m.Entropy) < minEntropy || len(m.Entropy) > maxEntropy:
		return bad("%d bytes of entropy instead of %d to %d", len(m.Entropy), minEntropy, maxEntropy)
	case m.Now == nil || !m.Now.IsValid() || m.Now.AsTime().Before(earliest):
		return bad("time %v", m.Now)
	case len(m.ScratchSerial) > 36 || strings.ContainsAny(m.ScratchSerial, "/ \x00"):
		return bad("scratch serial %q", m.ScratchSerial)
	}
	return nil
}

// setClock sets the wall clock.
func setClock(t time.Time) error {
	tv := unix.NsecToTimeval(t.UnixNano())
	return unix.Settimeofday(&tv)
}

// setNames sets what programs read about who they run on.
func setNames(machineID, hostname string) error {
	if hostname == "" {
		hostname = machineID
	}
	if err := unix.Sethostname([]byte(hostname)); err != nil {
		return fmt.Errorf("set host name %q: %w", hostname, err)
	}
	sum := sha256.Sum256([]byte("tandem machine id\x00" + machineID))
	for path, text := range map[string]string{
		"/etc/hostname":   hostname + "\n",
		"/etc/machine-id": hex.EncodeToString(sum[:16]) + "\n",
		"/etc/hosts":      "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 " + hostname + "\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
