package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"tandem/internal/hypervisor"
)

// phase is how far a machine's run has come.
type phase string

const (
	phaseStarting phase = "starting" // a driver killed here: kill what there is, the machine is stopped
	phaseRunning  phase = "running"
	phaseStopping phase = "stopping" // its end is wanted: stopped, not crashed
	phaseStopped  phase = "stopped"
	phaseCrashed  phase = "crashed"
)

// run is what is known of a machine's present or last run. Devices are recorded
// before they are attached and forgotten after they are gone, so that the record
// never lacks one.
type run struct {
	Phase       phase     `json:"phase"`
	Process     process   `json:"process"`
	UID         uint32    `json:"uid"`
	StartedAt   time.Time `json:"started_at"`
	Template    string    `json:"template,omitempty"`
	ForTemplate bool      `json:"for_template,omitempty"`
	Accelerator string    `json:"accelerator"`
	QEMU        string    `json:"qemu"`
	Hardware    string    `json:"hardware"` // digest of the static devices, see args.go
	Disks       []disk    `json:"disks,omitempty"`
	NICs        []nic     `json:"nics,omitempty"`
	Message     string    `json:"message,omitempty"`
}

type disk struct {
	Slot int             `json:"slot"`
	Disk hypervisor.Disk `json:"disk"`
}

type nic struct {
	Slot int            `json:"slot"`
	NIC  hypervisor.NIC `json:"nic"`
}

// writeJSON replaces a file atomically: readers, also after a crash, see the
// old content or the new one.
func writeJSON(file string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".tmp-")
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}

// readJSON reads what writeJSON wrote.
func readJSON(file string, v any) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 8<<20))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s is damaged: %w", file, err)
	}
	return nil
}
