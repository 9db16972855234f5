package hostnet_test

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"

	"tandem/internal/network"
	"tandem/internal/network/endpoint"
	"tandem/internal/network/internal/bed"
)

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

func frame(dst, src net.HardwareAddr, typ uint16, payload []byte) []byte {
	f := append(append([]byte{}, dst...), src...)
	return append(binary.BigEndian.AppendUint16(f, typ), payload...)
}

// udp builds an IPv4 UDP datagram; the UDP checksum is left out, as it may be.
func udp(src, dst string, port uint16, data string) []byte {
	n := 28 + len(data)
	b := make([]byte, 28, n)
	b[0], b[8], b[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(b[2:], uint16(n))
	copy(b[12:], net.ParseIP(src).To4())
	copy(b[16:], net.ParseIP(dst).To4())
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
	binary.BigEndian.PutUint16(b[20:], 5555)
	binary.BigEndian.PutUint16(b[22:], port)
	binary.BigEndian.PutUint16(b[24:], uint16(n-20))
	return append(b, data...)
}

func arp(op byte, sha net.HardwareAddr, spa, tpa string) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, op}
	b = append(append(b, sha...), net.ParseIP(spa).To4()...)
	return append(append(b, make([]byte, 6)...), net.ParseIP(tpa).To4()...)
}

func TestSpoofedFramesAreDropped(t *testing.T) {
	w := newWorld(t)
	var sink net.PacketConn
	if err := w.a2.Do(func() (err error) { sink, err = net.ListenPacket("udp4", "10.64.0.17:7000"); return err }); err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	mine, gw := w.a1.MAC, endpoint.GatewayMAC
	// Until the first arrives: links take a moment to be ready, and drop meanwhile.
	warm := frame(gw, mine, 0x800, udp("10.64.0.1", "10.64.0.17", 7000, "warm"))
	buf := make([]byte, 100)
	for end := time.Now().Add(30 * time.Second); ; {
		if err := w.a1.Send(warm); err != nil {
			t.Fatal(err)
		}
		sink.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if _, _, err := sink.ReadFrom(buf); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("nothing ever arrives")
		}
	}
	tagged := append([]byte{0, 5, 8, 0}, udp("10.64.0.1", "10.64.0.17", 7000, "vlan")...)
	for name, f := range map[string][]byte{
		"the other machine's address": frame(gw, mine, 0x800, udp("10.64.0.16", "10.64.0.17", 7000, "BAD ip")),
		"just outside its prefix":     frame(gw, mine, 0x800, udp("10.64.0.32", "10.64.0.17", 7000, "BAD outside")),
		"the gateway's address":       frame(gw, mine, 0x800, udp(network.Gateway, "10.64.0.17", 7000, "BAD gateway")),
		"the host's address":          frame(gw, mine, 0x800, udp(hostIP, "10.64.0.17", 7000, "BAD host")),
		"another project's address":   frame(gw, mine, 0x800, udp("10.64.1.1", "10.64.0.17", 7000, "BAD project")),
		"no address":                  frame(gw, mine, 0x800, udp("0.0.0.0", "10.64.0.17", 7000, "BAD zero")),
		"another machine's MAC":       frame(gw, w.a2.MAC, 0x800, udp("10.64.0.1", "10.64.0.17", 7000, "BAD mac")),
		"broadcast":                   frame(mac("ff:ff:ff:ff:ff:ff"), w.a2.MAC, 0x800, udp("10.64.0.1", "10.64.0.17", 7000, "BAD bcast")),
		"VLAN":                        frame(gw, mine, 0x8100, tagged),
		"IPv6":                        frame(mac("33:33:00:00:00:01"), mine, 0x86dd, make([]byte, 60)),
		"unknown protocol":            frame(gw, mine, 0x88cc, make([]byte, 60)),
		"a runt":                      frame(gw, mine, 0x800, []byte{0x45}),
		"runt ARP":                    frame(gw, mine, 0x806, []byte{0, 1}),
	} {
		if err := w.a1.Send(f); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// In order: had one of them passed, it would be read first.
	if err := w.a1.Send(frame(gw, mine, 0x800, udp("10.64.0.14", "10.64.0.17", 7000, "good"))); err != nil {
		t.Fatal(err)
	}
	sink.SetReadDeadline(time.Now().Add(20 * time.Second))
	n, from, err := sink.ReadFrom(buf)
	for err == nil && string(buf[:n]) == "warm" {
		n, from, err = sink.ReadFrom(buf)
	}
	if err != nil || string(buf[:n]) != "good" {
		t.Errorf("got %q from %v, %v", buf[:n], from, err)
	}
}

func TestSpoofedARPIsDropped(t *testing.T) {
	w := newWorld(t)
	mine, all := w.a1.MAC, mac("ff:ff:ff:ff:ff:ff")
	reply := func(to net.HardwareAddr, tpa string) func([]byte) bool {
		want := append(append([]byte{}, to...), net.ParseIP(tpa).To4()...)
		return func(f []byte) bool {
			return len(f) >= 42 && f[12] == 8 && f[13] == 6 && f[21] == 2 && bytes.Equal(f[32:42], want)
		}
	}
	for name, f := range map[string][]byte{
		"another's address":      frame(all, mine, 0x806, arp(1, mine, "10.64.0.17", network.Gateway)),
		"another's MAC":          frame(all, mine, 0x806, arp(1, w.a2.MAC, "10.64.0.1", network.Gateway)),
		"another's MAC outside":  frame(all, w.a2.MAC, 0x806, arp(1, mine, "10.64.0.2", network.Gateway)),
		"the gateway's":          frame(all, mine, 0x806, arp(2, mine, network.Gateway, network.Gateway)),
		"probe with foreign MAC": frame(all, mine, 0x806, arp(1, w.a2.MAC, "0.0.0.0", network.Gateway)),
	} {
		if err := w.a1.Send(f); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, spa := range []string{"10.64.0.3", "0.0.0.0"} { // its own, and a probe: a machine may have no address itself
		// As a real machine does: asked again when there was no answer in time.
		answered := false
		for try := 0; try < 20 && !answered; try++ {
			if err := w.a1.Send(frame(all, mine, 0x806, arp(1, mine, spa, network.Gateway))); err != nil {
				t.Fatal(err)
			}
			answered = w.a1.Seen(time.Second, reply(mine, spa))
		}
		if !answered {
			t.Errorf("no answer to ARP from %s", spa)
		}
	}
	for _, bad := range []struct {
		to  net.HardwareAddr
		spa string
	}{{mine, "10.64.0.17"}, {w.a2.MAC, "10.64.0.1"}, {mine, "10.64.0.2"}, {w.a2.MAC, "0.0.0.0"}} {
		if w.a1.Seen(0, reply(bad.to, bad.spa)) {
			t.Errorf("ARP from %s %s is answered", bad.to, bad.spa)
		}
	}
	bed.Serve(t, w.a2.NS, "a2", "10.64.0.17:80")
	bed.MustAsk(t, w.a1.NS, "tcp", "10.64.0.17:80", "a2 sees 10.64.0.1")
}
