// Command testguest is tandem-guest with a keyhole, for tests: PID 1 also obeys
// lines on a second port, "tandem.test.0". It is never part of a product's image.
package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tandem/internal/guest"
)

func main() {
	if os.Getpid() == 1 {
		go obey()
	}
	guest.Main(os.Args)
}

// obey answers each line "command argument..." with one line of JSON: {out, err}.
func obey() {
	for {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			b, _ := os.ReadFile(n)
			if strings.TrimSpace(string(b)) != "tandem.test.0" {
				continue
			}
			f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR|unix.O_NONBLOCK, 0)
			if err != nil {
				continue
			}
			for {
				r := bufio.NewReader(f)
				for {
					line, err := r.ReadString('\n')
					if err != nil {
						break
					}
					out, err := do(strings.Fields(line))
					answer := map[string]string{"out": out}
					if err != nil {
						answer["err"] = err.Error()
					}
					b, _ := json.Marshal(answer)
					f.Write(append(b, '\n'))
				}
				time.Sleep(20 * time.Millisecond) // nobody is connected
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func do(args []string) (string, error) {
	if len(args) == 0 {
		return "", fmt.Errorf("empty line")
	}
	switch cmd, a := args[0], args[1:]; {
	case cmd == "read" && len(a) == 1:
		b, err := os.ReadFile(a[0])
		return string(b), err
	case cmd == "write" && len(a) == 2:
		return "", os.WriteFile(a[0], []byte(a[1]), 0o644)
	case cmd == "glob" && len(a) == 1:
		m, err := filepath.Glob(a[0])
		return strings.Join(m, " "), err
	case cmd == "agent": // its pid
		procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, p := range procs {
			if b, _ := os.ReadFile(p); bytes.Equal(b, []byte("/init\x00agent\x00")) {
				return filepath.Base(filepath.Dir(p)), nil
			}
		}
		return "", fmt.Errorf("no agent")
	case cmd == "kill" && len(a) == 2:
		sig, _ := strconv.Atoi(a[0])
		pid, err := strconv.Atoi(a[1])
		if err != nil || pid < 2 {
			return "", fmt.Errorf("pid %q", a[1])
		}
		return "", unix.Kill(pid, unix.Signal(sig))
	case cmd == "random":
		b := make([]byte, 16)
		rand.Read(b)
		return hex.EncodeToString(b), nil
	case cmd == "fill" && len(a) == 1: // a file system
		f, err := os.Create(filepath.Join(a[0], "full"))
		if err != nil {
			return "", err
		}
		defer f.Close()
		b, n := make([]byte, 1<<20), 0
		for {
			k, err := f.Write(b)
			n += k
			if err != nil {
				return fmt.Sprint(n), nil
			}
		}
	case cmd == "busy": // as many loops as asked for, for ever
		n, _ := strconv.Atoi(a[0])
		for range n {
			go func() {
				for n := 0; ; n++ {
				}
			}()
		}
		return fmt.Sprint(runtime.NumGoroutine()), nil
	case cmd == "kmsg":
		b := make([]byte, 1<<18)
		n, err := unix.Klogctl(3, b) // SYSLOG_ACTION_READ_ALL
		return string(b[:max(n, 0)]), err
	case cmd == "time":
		return strconv.FormatInt(time.Now().Unix(), 10), nil
	}
	return "", fmt.Errorf("unknown command %q", args)
}
