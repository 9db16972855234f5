package qemu

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"time"
)

// logInterval is how often logs are looked at.
const logInterval = 2 * time.Second

// tail returns the last n bytes of a file; nothing if it is not there.
func tail(file string, n int64) ([]byte, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	n = max(0, min(n, size))
	b := make([]byte, n)
	k, err := f.ReadAt(b, size-n)
	if errors.Is(err, io.EOF) { // cut short meanwhile
		err = nil
	}
	return b[:k], err
}

// trimLogs keeps the logs of all machines within their bound.
func (d *Driver) trimLogs() {
	defer d.wg.Done()
	tick := time.NewTicker(logInterval)
	defer tick.Stop()
	for {
		select {
		case <-d.closed:
			return
		case <-tick.C:
		}
		d.mu.Lock()
		var dirs []*machine
		for _, m := range d.machines {
			dirs = append(dirs, m)
		}
		d.mu.Unlock()
		for _, m := range dirs {
			for _, name := range []string{"console.log", "qemu.log"} {
				if err := trim(m.file(name), d.opt.ConsoleLog); err != nil {
					d.log.Warn("trim a log", "machine", m.id, "log", name, "error", err)
				}
			}
		}
	}
}

// trim moves the newest part of a log that has become too long to FILE.1, and
// starts it anew in place: its writer appends through a descriptor of its own.
// What is written between the copy and the cut is lost.
func trim(file string, limit int64) error {
	fi, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) || err == nil && fi.Size() <= limit {
		return nil
	} else if err != nil {
		return err
	}
	b, err := tail(file, limit/2)
	if err != nil {
		return err
	}
	if err := os.WriteFile(file+".tmp", b, 0o600); err != nil {
		// A full disk: the cut below is what helps.
		_ = os.Remove(file + ".tmp")
		return errors.Join(err, os.Truncate(file, 0))
	}
	return errors.Join(os.Rename(file+".tmp", file+".1"), os.Truncate(file, 0))
}
