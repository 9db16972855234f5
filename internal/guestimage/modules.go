package guestimage

import (
	"bytes"
	"debug/elf"
	"fmt"
	"path"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
)

// The modules of the guest, by when they load. Dependencies come by themselves.
var (
	// bootModules are what the agent's port needs: loaded before the agent starts.
	bootModules = []string{"virtio_pci", "virtio_console"}
	// lateModules load right after it has started.
	lateModules = []string{
		"virtio_scsi", "sd_mod", "virtio_net", "virtio_mem", "virtio_balloon", "overlay", "veth", "button", "pvpanic_mmio",
	}
	// demandModules load when the kernel asks for them (modprobe).
	demandModules = []string{
		"nf_tables", "nft_chain_nat", "nft_masq", "nft_nat", "nft_ct", "nft_fib_ipv4", "nft_fib_inet", "nft_reject_ipv4",
		"nft_reject_inet", "nft_compat", "nf_conntrack", "nf_nat", "x_tables", "ip_tables", "iptable_filter", "iptable_nat",
		"xt_conntrack", "xt_MASQUERADE", "xt_addrtype", "xt_tcpudp", "xt_nat", "xt_comment", "xt_mark",
		"tun", "fuse", "erofs", "squashfs", "bridge", "br_netfilter", "dummy", "virtio_blk", "loop",
	}
)

// module is one kernel module.
type module struct {
	name    string
	data    []byte
	depends []string
	aliases []string
}

// moduleSet is what goes on board.
type moduleSet struct {
	order []*module // each after what it depends on
	boot  []string
	late  []string
}

// normal is a module's name as the kernel writes it.
func normal(name string) string { return strings.ReplaceAll(name, "-", "_") }

func moduleName(file string) string {
	return normal(strings.TrimSuffix(path.Base(file), ".ko"))
}

// parseModule reads a module's own words about itself (section .modinfo).
func parseModule(name string, data []byte) (*module, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("module %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("module %s has no .modinfo: %w", name, errdefs.ErrInvalidArgument)
	}
	info, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("module %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	m := &module{name: name, data: data}
	for _, kv := range bytes.Split(info, []byte{0}) {
		k, v, _ := strings.Cut(string(kv), "=")
		switch k {
		case "depends":
			for _, d := range strings.Split(v, ",") {
				if d != "" {
					m.depends = append(m.depends, normal(d))
				}
			}
		case "softdep":
			// "pre: crc32c": crypto that is built in; nothing to do.
		case "alias":
			m.aliases = append(m.aliases, v)
		}
	}
	sort.Strings(m.aliases)
	return m, nil
}

// resolve picks the guest's modules and puts them in order.
func resolve(all map[string][]byte, builtin map[string]bool) (*moduleSet, error) {
	set := &moduleSet{}
	state := map[string]int{} // 1: being added, 2: added
	var add func(name string) error
	add = func(name string) error {
		if builtin[name] || state[name] == 2 {
			return nil
		}
		if state[name] == 1 {
			return fmt.Errorf("module %s depends on itself: %w", name, errdefs.ErrInvalidArgument)
		}
		data, ok := all[name]
		if !ok {
			return fmt.Errorf("kernel module %s is missing; take a Debian cloud kernel: %w", name, errdefs.ErrInvalidArgument)
		}
		state[name] = 1
		m, err := parseModule(name, data)
		if err != nil {
			return err
		}
		for _, d := range m.depends {
			if err := add(d); err != nil {
				return err
			}
		}
		state[name] = 2
		set.order = append(set.order, m)
		return nil
	}
	for _, group := range []struct {
		names []string
		list  *[]string
	}{{bootModules, &set.boot}, {lateModules, &set.late}, {demandModules, nil}} {
		for _, name := range group.names {
			begin := len(set.order)
			if err := add(name); err != nil {
				return nil, err
			}
			if group.list != nil {
				for _, m := range set.order[begin:] {
					*group.list = append(*group.list, m.name)
				}
			}
		}
	}
	return set, nil
}

// stripSignature cuts the appended signature off: checking it takes the guest
// longer than loading the module.
func stripSignature(ko []byte) []byte {
	const marker = "~Module signature appended~\n"
	if !bytes.HasSuffix(ko, []byte(marker)) {
		return ko
	}
	// struct module_signature: 8 bytes, then sig_len as a big endian uint32.
	end := len(ko) - len(marker)
	if end < 12 {
		return ko
	}
	n := int(ko[end-4])<<24 | int(ko[end-3])<<16 | int(ko[end-2])<<8 | int(ko[end-1])
	if n < 0 || n > end-12 {
		return ko
	}
	return ko[:end-12-n]
}
