package guest

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"tandem/internal/files"
	"tandem/internal/guest/layout"
)

// identity is who this guest is. It is kept in RunDir, so that the next agent
// process goes on as the same.
type identity struct {
	// GuestID is random: new for every boot and every clone. Empty in a guest that
	// was made ready to be a template: what wakes up from it is somebody else.
	GuestID   string `json:"guest_id"`
	MachineID string `json:"machine_id"`
	Hostname  string `json:"hostname"`
	// ScratchSerial is the disk mounted on StateDir; empty: none.
	ScratchSerial string `json:"scratch_serial"`
	// Sealed: Quiesce was the last call. Only Configure makes it a guest again.
	Sealed bool `json:"sealed"`
}

func (id identity) configured() bool { return id.MachineID != "" }

// loadIdentity reads what an earlier agent process kept, or begins anew. The
// identity is good also when there is an error.
func loadIdentity() (identity, error) {
	var id identity
	b, err := os.ReadFile(layout.IdentityFile)
	if err == nil {
		if err = json.Unmarshal(b, &id); err == nil {
			return id, nil
		}
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	id = identity{GuestID: newGuestID(nil)}
	if serr := id.save(); err == nil {
		err = serr
	}
	return id, err
}

// save keeps the identity; whole or not at all.
func (id identity) save() error {
	b, err := json.Marshal(id)
	if err != nil {
		return err
	}
	if err := files.Replace(layout.IdentityFile, b, 0o600); err != nil {
		return fmt.Errorf("keep the guest's identity: %w", err)
	}
	return nil
}

// newGuestID is random also if the kernel's generator was cloned: the host's
// entropy goes in.
func newGuestID(entropy []byte) string {
	h := sha256.New()
	h.Write([]byte("tandem guest id\x00"))
	h.Write(entropy)
	var own [32]byte
	rand.Read(own[:])
	h.Write(own[:])
	return hex.EncodeToString(h.Sum(nil))[:32]
}
