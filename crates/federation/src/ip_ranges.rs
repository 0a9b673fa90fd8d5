//! Which addresses this server connects to by itself: not those of its own network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A network in prefix notation, IPv4 folded into IPv6 so that a mapped address is no way round it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    bits: u128,
    prefix: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an IP range such as 10.0.0.0/8")]
pub struct BadRange(String);

/// Allowed and denied networks. What is allowed is allowed even where it is denied too.
#[derive(Clone, Debug, Default)]
pub struct IpRanges {
    allow: Vec<Network>,
    deny: Vec<Network>,
}

/// Loopback, private, link-local, shared, documentation, benchmark, multicast and reserved networks.
pub const DENIED_BY_DEFAULT: [&str; 23] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/128",
    "::1/128",
    "2001:db8::/32",
    "2002::/16",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
];

impl IpRanges {
    pub fn new(allow: &[String], deny: &[String]) -> Result<Self, BadRange> {
        Ok(Self {
            allow: allow
                .iter()
                .map(|r| Network::parse(r))
                .collect::<Result<_, _>>()?,
            deny: deny
                .iter()
                .map(|r| Network::parse(r))
                .collect::<Result<_, _>>()?,
        })
    }

    /// The default: every public address, and besides only what `allow` names.
    pub fn public_and(allow: &[String]) -> Result<Self, BadRange> {
        Self::new(allow, &DENIED_BY_DEFAULT.map(String::from))
    }

    /// Every address. For tests and closed networks.
    pub fn all() -> Self {
        Self::default()
    }

    pub fn permits(&self, address: IpAddr) -> bool {
        let bits = fold(address);
        self.allow.iter().any(|n| n.contains(bits)) || !self.deny.iter().any(|n| n.contains(bits))
    }
}

impl Network {
    fn parse(text: &str) -> Result<Self, BadRange> {
        let bad = || BadRange(text.into());
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let (width, offset) = if address.is_ipv4() {
            (32, 96)
        } else {
            (128, 0)
        };
        let prefix: u8 = match prefix {
            Some(digits) => digits.parse().map_err(|_| bad())?,
            None => width,
        };
        if prefix > width {
            return Err(bad());
        }
        let prefix = prefix + offset;
        Ok(Self {
            bits: fold(address) & mask(prefix),
            prefix,
        })
    }

    fn contains(&self, bits: u128) -> bool {
        bits & mask(self.prefix) == self.bits
    }
}

fn mask(prefix: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

/// An address as 128 bits: IPv4 in its mapped form, and the IPv4 address behind a NAT64 one.
fn fold(address: IpAddr) -> u128 {
    const NAT64: u128 = 0x0064_ff9b_u128 << 96;
    let mapped = |v4: Ipv4Addr| v4.to_ipv6_mapped().to_bits();
    match address {
        IpAddr::V4(v4) => mapped(v4),
        IpAddr::V6(v6) => {
            let bits = Ipv6Addr::to_bits(v6);
            if bits & mask(96) == NAT64 {
                let low = u32::try_from(bits & u128::from(u32::MAX)).expect("32 bits are left");
                mapped(Ipv4Addr::from_bits(low))
            } else {
                bits
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permitted(ranges: &IpRanges, address: &str) -> bool {
        ranges.permits(address.parse().unwrap())
    }

    #[test]
    fn private_addresses_are_denied_in_every_spelling() {
        let ranges = IpRanges::public_and(&[]).unwrap();
        for inside in [
            "127.0.0.1",
            "10.1.2.3",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "::1",
            "::ffff:127.0.0.1",
            "64:ff9b::a00:1",
            "fe80::1",
            "fd00::1",
            "0.0.0.0",
        ] {
            assert!(!permitted(&ranges, inside), "{inside}");
        }
        for outside in [
            "1.1.1.1",
            "172.32.0.1",
            "2606:4700::1111",
            "64:ff9b::101:101",
        ] {
            assert!(permitted(&ranges, outside), "{outside}");
        }
    }

    #[test]
    fn an_allowed_range_wins_over_the_denied_ones() {
        let ranges = IpRanges::public_and(&["127.0.0.0/8".into(), "::1".into()]).unwrap();
        assert!(permitted(&ranges, "127.0.0.1"));
        assert!(permitted(&ranges, "::1"));
        assert!(!permitted(&ranges, "10.0.0.1"));
        let everything = IpRanges::public_and(&["0.0.0.0/0".into(), "::/0".into()]).unwrap();
        assert!(permitted(&everything, "10.0.0.1"));
    }

    #[test]
    fn nonsense_is_no_range() {
        for bad in [
            "",
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "10.0.0.0/-1",
            "x/8",
        ] {
            assert!(IpRanges::public_and(&[bad.into()]).is_err(), "{bad}");
        }
    }
}
