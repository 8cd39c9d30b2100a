//! What the programs know of the node they run on.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::relay::Relay;
use crate::addr::Addr;

/// One of this node's own addresses, by the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NodeAddress {
    pub flags: u32,
}

impl NodeAddress {
    /// NodePorts are served on it (`nodePortAddresses`, rule 24).
    pub const NODE_PORTS: u32 = 1;
}

/// What stands in for clients whose replies must come back through this node (rule 26), and by interface for pods whose
/// packets leave by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Masquerade {
    /// [`Addr::UNSPECIFIED`] where the node has no address of the family.
    pub v4: Addr,
    pub v6: Addr,
}

/// A range to which pods' packets keep their source. 1 in every row.
pub type Unmasqueraded = u32;

/// What the programs are told of the cluster and of the moment; the agent may change it while they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Settings {
    /// [`Settings::MASQUERADE_ALL`], [`Settings::MIGRATING`] and [`Settings::POLICIES`].
    pub flags: u32,
    /// The ranges that cluster IPs are taken from, the ones in use first: whatever is in one and no service's goes
    /// nowhere (rule 19).
    pub ranges: [ServiceRange; Self::RANGES],
    /// Another number whenever a live flow may have lost its permission: a flow that was judged under another one is judged
    /// again at its next packet (rule 52).
    pub epoch: u32,
    /// How packets are relayed to other nodes.
    pub relay: Relay,
}

/// The words are those of a mapped address, in memory order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ServiceRange {
    /// The first address.
    pub first: [u32; 4],
    pub mask: [u32; 4],
    /// 1 in a row that counts, and written last: before that the others are not to be believed.
    pub used: u32,
}

impl Settings {
    /// Clients of services are masqueraded wherever they are, pods too (rule 26 e).
    pub const MASQUERADE_ALL: u32 = 1;
    /// Rules of kube-proxy are in the kernel: connections that it opened are its to finish.
    pub const MIGRATING: u32 = 2;
    /// Policies apply to a pod of this node. Without it the programs look none up.
    pub const POLICIES: u32 = 4;

    /// How many ranges there is room for. A cluster has one of each family at first; more come as `ServiceCIDR`
    /// objects.
    pub const RANGES: usize = 8;

    /// What a fresh map holds.
    pub const NONE: Self = Self {
        flags: 0,
        ranges: [ServiceRange { first: [0; 4], mask: [0; 4], used: 0 }; Self::RANGES],
        epoch: 0,
        relay: Relay { device: 0, room: 0, vni: 0 },
    };

    /// Whether the address is in a range of cluster IPs.
    #[inline(always)]
    pub fn is_service_address(&self, addr: &Addr) -> bool {
        let [a0, a1, a2, a3] = addr.words();
        for range in &self.ranges {
            let ([f0, f1, f2, f3], [m0, m1, m2, m3]) = (range.first, range.mask);
            if range.used == 0 {
                return false;
            }
            // One comparison, last word first: that is where IPv4 ranges differ.
            if ((a3 ^ f3) & m3) | ((a2 ^ f2) & m2) | ((a1 ^ f1) & m1) | ((a0 ^ f0) & m0) == 0 {
                return true;
            }
        }
        false
    }
}

impl ServiceRange {
    /// `bits` counts those of the 16 bytes of `first` that count.
    pub fn new(first: &Addr, bits: u8) -> Self {
        let mask = u128::MAX.checked_shl(128 - u32::from(bits.min(128))).unwrap_or(0);
        Self { first: first.words(), mask: Addr { bytes: mask.to_be_bytes() }.words(), used: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_19_ranges_contain_the_addresses_that_share_their_bits() {
        let mut settings = Settings::NONE;
        let mut six = [0; 16];
        six[0] = 0xfd;
        assert!(!settings.is_service_address(&Addr::UNSPECIFIED));
        settings.ranges[0] = ServiceRange::new(&Addr::v4([10, 96, 0, 0]), 96 + 12);
        settings.ranges[1] = ServiceRange::new(&Addr::v6(six), 112);
        for last in [[10, 96, 0, 0], [10, 111, 255, 255]] {
            assert!(settings.is_service_address(&Addr::v4(last)), "{last:?}");
        }
        for other in [[10, 95, 255, 255], [10, 112, 0, 0], [0, 0, 0, 0]] {
            assert!(!settings.is_service_address(&Addr::v4(other)), "{other:?}");
        }
        (six[14], six[15]) = (9, 9);
        assert!(settings.is_service_address(&Addr::v6(six)));
        six[13] = 1;
        assert!(!settings.is_service_address(&Addr::v6(six)));
        let every = ServiceRange::new(&Addr::UNSPECIFIED, 0);
        assert_eq!(every.mask, [0; 4]);
    }
}
