package httprunner

import (
	"fmt"
	"net/netip"
	"slices"
)

// A hole is a range of addresses that a call may not reach unless its policy allows private
// networks.
type hole struct {
	prefix netip.Prefix
	what   string
}

// holes are the ranges of the IANA special-purpose registries that do not lead to the public
// internet, and the metadata services of clouds that lie outside of them.
var holes = []hole{
	{netip.MustParsePrefix("0.0.0.0/8"), "unspecified"},
	{netip.MustParsePrefix("10.0.0.0/8"), "private"},
	{netip.MustParsePrefix("100.64.0.0/10"), "shared (carrier-grade NAT)"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("168.63.129.16/32"), "metadata"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local (metadata)"},
	{netip.MustParsePrefix("172.16.0.0/12"), "private"},
	{netip.MustParsePrefix("192.0.0.0/24"), "reserved"},
	{netip.MustParsePrefix("192.0.2.0/24"), "documentation"},
	{netip.MustParsePrefix("192.88.99.0/24"), "6to4 relay"},
	{netip.MustParsePrefix("192.168.0.0/16"), "private"},
	{netip.MustParsePrefix("198.18.0.0/15"), "benchmarking"},
	{netip.MustParsePrefix("198.51.100.0/24"), "documentation"},
	{netip.MustParsePrefix("203.0.113.0/24"), "documentation"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved"},
	{netip.MustParsePrefix("::1/128"), "loopback"},
	{netip.MustParsePrefix("::/128"), "unspecified"},
	{netip.MustParsePrefix("fc00::/7"), "private (unique local)"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
	{netip.MustParsePrefix("2001::/23"), "reserved (Teredo and others)"},
	{netip.MustParsePrefix("2001:db8::/32"), "documentation"},
	{netip.MustParsePrefix("2002::/16"), "6to4"},
	{netip.MustParsePrefix("3fff::/20"), "documentation"},
}

var (
	globalUnicast6 = netip.MustParsePrefix("2000::/3")
	nat64          = netip.MustParsePrefix("64:ff9b::/96")
	nat64Local     = netip.MustParsePrefix("64:ff9b:1::/48")
	sixToFour      = netip.MustParsePrefix("2002::/16")
	teredo         = netip.MustParsePrefix("2001::/32")
	compatible4    = netip.MustParsePrefix("::/96")
	translated4    = netip.MustParsePrefix("::ffff:0:0:0/96")
)

// metadataRanges are the addresses at which machines find their own credentials and neighbours.
var metadataRanges = []netip.Prefix{
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("168.63.129.16/32"),   // Azure's host
	netip.MustParsePrefix("100.100.100.200/32"), // Alibaba
	netip.MustParsePrefix("192.0.0.192/32"),     // Oracle
	netip.MustParsePrefix("fd00:ec2::/32"),      // AWS over IPv6
	netip.MustParsePrefix("fd20:ce::254/128"),   // Google over IPv6
	netip.MustParsePrefix("fd00:42::42/128"),    // Scaleway
}

// embedded gives the IPv4 addresses that an IPv6 address may lead to.
func embedded(addr netip.Addr) []netip.Addr {
	b := addr.As16()
	last := netip.AddrFrom4([4]byte(b[12:]))
	switch {
	case !addr.Is6():
		return nil
	case addr.Is4In6():
		return []netip.Addr{addr.Unmap()}
	case nat64.Contains(addr), compatible4.Contains(addr), translated4.Contains(addr):
		return []netip.Addr{last}
	case nat64Local.Contains(addr):
		// RFC 6052 puts the address at one of these places, by the length of the network's own prefix.
		return []netip.Addr{
			netip.AddrFrom4([4]byte{b[6], b[7], b[9], b[10]}), netip.AddrFrom4([4]byte{b[7], b[9], b[10], b[11]}),
			netip.AddrFrom4([4]byte(b[9:13])), last,
		}
	case sixToFour.Contains(addr):
		return []netip.Addr{netip.AddrFrom4([4]byte(b[2:6]))}
	case teredo.Contains(addr):
		return []netip.Addr{netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]})}
	}
	return nil
}

// metadataAddress says whether an address is link-local or that of a metadata service, written
// plainly or inside an IPv6 address.
func metadataAddress(addr netip.Addr) bool {
	if !addr.IsValid() {
		return false
	}
	plain := addr.WithZone("")
	return slices.ContainsFunc(metadataRanges, func(p netip.Prefix) bool { return p.Contains(plain) }) || slices.ContainsFunc(embedded(plain), metadataAddress)
}

// privateAddress says what keeps an address from being a public one, "" for a public one.
// IPv4 addresses inside IPv6 ones count as what they are; the forms of IPv6 that can hide a
// private one in ways that are not looked into are not public.
func privateAddress(addr netip.Addr) string {
	if addr.Zone() != "" {
		return "link-local"
	}
	if addr.Is4In6() {
		addr = addr.Unmap()
	}
	if nat64.Contains(addr) {
		raw := addr.As16()
		inner := netip.AddrFrom4([4]byte(raw[12:]))
		if what := privateAddress(inner); what != "" {
			return fmt.Sprintf("%s (%s through NAT64)", what, inner)
		}
		return ""
	}
	i := slices.IndexFunc(holes, func(h hole) bool { return h.prefix.Contains(addr) })
	switch {
	case i >= 0:
		return holes[i].what
	case !addr.IsValid():
		return "not an IP address"
	case addr.Is6() && !globalUnicast6.Contains(addr):
		return "reserved"
	}
	return ""
}

// neverAddress says what keeps an address from being connected to under any policy: these
// name no single machine.
func neverAddress(addr netip.Addr) string {
	addr = addr.Unmap()
	switch {
	case !addr.IsValid():
		return "not an IP address"
	case addr.IsMulticast():
		return "multicast"
	case addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "broadcast"
	}
	return ""
}
