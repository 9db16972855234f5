package guest

import (
	"encoding/binary"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctls of /dev/random (linux/random.h).
const (
	ioctlAddEntropy = 0x40085203 // RNDADDENTROPY
	ioctlReseed     = 0x5207     // RNDRESEEDCRNG
)

// reseed mixes entropy into the kernel's generator and makes it use that now.
// Without it two clones of a template give the same "random" numbers.
func reseed(entropy []byte) error {
	f, err := os.OpenFile("/dev/random", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct rand_pool_info: bits that it counts for, bytes, the bytes.
	info := make([]byte, 8+(len(entropy)+3)&^3)
	binary.LittleEndian.PutUint32(info, uint32(min(8*len(entropy), 4096)))
	binary.LittleEndian.PutUint32(info[4:], uint32(len(entropy)))
	copy(info[8:], entropy)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ioctlAddEntropy, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return os.NewSyscallError("RNDADDENTROPY", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ioctlReseed, 0); errno != 0 {
		return os.NewSyscallError("RNDRESEEDCRNG", errno)
	}
	return nil
}
