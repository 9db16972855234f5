package hostnet

import (
	"fmt"

	"github.com/google/nftables"
)

var familyNames = map[nftables.TableFamily]string{
	nftables.TableFamilyIPv4: "ip",
	nftables.TableFamilyINet: "inet",
}

// ForwardBlockers lists chains of other programs ("ip filter FORWARD") that drop
// what they don't know of all that the host forwards. Nftables lets any table
// drop what another accepted, so that Tandem can't overrule them: guests have no
// egress, and published ports no answer from outside, until the administrator
// lets interfaces named tdt* and tdv* pass there. docs/architecture/network.md has
// the commands. A chain that is listed may do so already: this is a hint for who
// looks for a reason. Rules of iptables-legacy are not seen.
func ForwardBlockers() ([]string, error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	var out []string
	for _, ch := range chains {
		family, ok := familyNames[ch.Table.Family]
		if ok && ch.Type == nftables.ChainTypeFilter && ch.Hooknum != nil && *ch.Hooknum == *nftables.ChainHookForward &&
			ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop {
			out = append(out, family+" "+ch.Table.Name+" "+ch.Name)
		}
	}
	return out, nil
}
