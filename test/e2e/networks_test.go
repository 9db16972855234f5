package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"tandem/test/host"
)

const nets = `
name: nets
services:
  front:
    image: busybox:latest
    command: ["httpd", "-f", "-p", "80", "-h", "/data"]
    networks: [front]
    x-tandem: {isolation: ISOLATION}
  back:
    image: busybox:latest
    command: ["httpd", "-f", "-p", "80", "-h", "/data"]
    networks: [back]
    x-tandem: {isolation: ISOLATION}
  both:
    image: busybox:latest
    command: ["httpd", "-f", "-p", "80", "-h", "/data"]
    networks: BOTH
    ports: ["8080:80"]
    stop_grace_period: 1s
    x-tandem: {isolation: ISOLATION}
networks:
  front: {}
  back: {internal: true}
`

// TestSeveralNetworks is a proxy between two networks: each side reaches it by its
// name, and by its address on that side only; the sides don't reach each other, be it
// inside one machine or on the host itself.
func TestSeveralNetworks(t *testing.T) {
	for _, isolation := range []string{"project", "metal"} {
		t.Run(isolation, func(t *testing.T) { severalNetworks(t, isolation) })
	}
}

func severalNetworks(t *testing.T, isolation string) {
	h := host.New(t)
	h.Launch()
	h.ImportTree("busybox:latest", func(root string) {
		host.BusyboxTree(t, root)
		host.Write(t, root, "data/index.html", "here\n")
	}, `CMD ["sh"]`, "ENV PATH=/bin")
	text := strings.ReplaceAll(nets, "ISOLATION", isolation)
	f := h.Compose("nets", strings.ReplaceAll(text, "BOTH", "[front, back]"))
	h.Tandem("up", "-f", f)

	front, back, both := h.Container("nets-front-1"), h.Container("nets-back-1"), h.Container("nets-both-1")
	if front.Assignment.MachineID != back.Assignment.MachineID || (front.Assignment.MachineID == "") != (isolation == "metal") {
		t.Errorf("front is in %q, back in %q; want one machine, or none on metal", front.Assignment.MachineID, back.Assignment.MachineID)
	}
	at := map[string]string{}
	for _, a := range both.Assignment.Addresses {
		at[a.Network] = a.IP
	}
	if len(at) != 2 || at["front"] == "" || at["back"] == "" || both.Assignment.IP != at["back"] {
		t.Fatalf("addresses %v, the first %q; want one in each network, back's first", both.Assignment.Addresses, both.Assignment.IP)
	}
	if out := h.Tandem("exec", "-p", "nets", "both", "ip", "addr", "show", "eth0"); !strings.Contains(out, at["front"]+"/32") || !strings.Contains(out, at["back"]+"/32") {
		t.Errorf("eth0 of both: %s", out)
	}
	run := func(service string, args ...string) (string, error) {
		return h.TryFor(2*time.Minute, "", append([]string{"exec", "-p", "nets", service}, args...)...)
	}
	// The image's wget is static and has no resolver: a name is looked up first.
	lookup := func(from, name string) (string, error) {
		out, err := run(from, "nslookup", name) // also fails for want of an IPv6 address
		_, out, _ = strings.Cut(out, "Name:")
		var ips []string
		for line := range strings.Lines(out) {
			if key, ip, _ := strings.Cut(line, ":"); strings.HasPrefix(key, "Address") {
				ips = append(ips, strings.TrimSpace(ip))
			}
		}
		if len(ips) > 0 {
			err = nil
		}
		return strings.Join(ips, " "), err
	}
	reach := func(from, to string) error {
		if strings.Trim(to, "0123456789.") != "" {
			ip, err := lookup(from, to)
			if err != nil || ip == "" {
				return fmt.Errorf("%s is %q: %v", to, ip, err)
			}
			to = ip
		}
		out, err := run(from, "timeout", "20", "wget", "-q", "-O", "-", "http://"+to+"/index.html")
		if err == nil && out != "here\n" {
			err = fmt.Errorf("got %q", out)
		}
		return err
	}
	for _, x := range [][2]string{{"front", "both"}, {"back", "both"}, {"both", "front"}, {"both", "back"}, {"front", at["front"]}, {"back", at["back"]}} {
		h.Eventually(time.Minute, x[0]+" reaches "+x[1], func() error { return reach(x[0], x[1]) })
	}
	for service, want := range map[string]string{"front": at["front"], "back": at["back"]} {
		if ip, err := lookup(service, "both"); err != nil || ip != want {
			t.Errorf("both is, to %s: %q, %v; want %s", service, ip, err, want)
		}
	}
	// Who asks from which address: towards a network, the one there; out, that of the
	// network that has a way out.
	for to, want := range map[string]string{front.Assignment.IP: at["front"], back.Assignment.IP: at["back"], "192.0.2.99": at["front"]} {
		if out, err := run("both", "ip", "route", "get", to); err != nil || !strings.Contains(out, "src "+want) {
			t.Errorf("from both to %s: %s, %v; want %s", to, out, err, want)
		}
	}
	h.Eventually(time.Minute, "the published port", func() error {
		page, err := h.Curl("http://127.0.0.1:8080/index.html")
		if err == nil && page != "here\n" {
			err = fmt.Errorf("got %q", page)
		}
		return err
	})
	refused := func(from, to string) {
		t.Helper()
		if out, err := run(from, "timeout", "5", "wget", "-q", "-O", "-", "http://"+to+"/index.html"); err == nil {
			t.Errorf("%s reaches %s: %q", from, to, out)
		}
	}
	unknown := func(from, name string) {
		t.Helper()
		if ip, _ := lookup(from, name); ip != "" {
			t.Errorf("%s knows %s: %s", from, name, ip)
		}
	}
	unknown("front", "back")
	unknown("back", "front")
	refused("front", back.Assignment.IP)
	refused("back", front.Assignment.IP)
	refused("front", at["back"])
	refused("back", at["front"])

	// Another list is another container; what it had is free and forgotten.
	f = h.Compose("nets", strings.ReplaceAll(text, "BOTH", "[front]"))
	h.Tandem("up", "-f", f)
	after := h.Container("nets-both-1")
	if after.Meta.ID == both.Meta.ID || len(after.Assignment.Addresses) != 1 || after.Assignment.Addresses[0].Network != "front" {
		t.Errorf("after leaving back: %+v, was %+v", after.Assignment, both.Assignment)
	}
	h.Eventually(time.Minute, "front reaches the new one", func() error { return reach("front", "both") })
	unknown("back", "both")
	refused("back", after.Assignment.IP)
	if again := h.Container("nets-front-1"); again.Meta.ID != front.Meta.ID {
		t.Errorf("front was made anew: %v", again.Meta)
	}
}
