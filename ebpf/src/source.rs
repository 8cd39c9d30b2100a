//! A pod sends from its own addresses alone.
//!
//! Whatever is decided by a packet's source (which pod it is, what policies say of it, where its answers go) would else be
//! decided by whoever writes it. A pod's addresses are those whose row in `endpoints` has its interface. Beside them only
//! what stays on its link: neighbour discovery and groups, from IPv6's link-local addresses and from `::`, which stands
//! for none (RFC 4861 section 4, RFC 3810 section 5). There is no such thing in IPv4: a pod has no need of DHCP.

use ferroflow_common::addr::Addr;
use ferroflow_common::verdict::DropReason;

use crate::icmp::Errors;
use crate::packet::{L3, Packet};
use crate::tables::{Aligned, Tables};

/// What is known of who sends.
pub trait Senders<P> {
    /// Whether sources are checked: fixed when the programs are loaded.
    fn checks_sources(&self) -> bool;
    /// The interface that the packet came from.
    fn sender(&self, packet: &P) -> u32;
}

/// Checks the source of a packet that a pod sends.
///
/// # Errors
/// [`DropReason::SpoofedSource`]; [`DropReason::Truncated`] where it has none.
#[inline(always)]
pub fn check<F, P, T>(packet: &P, tables: &T) -> Result<(), DropReason>
where
    F: Errors,
    P: Packet,
    T: Tables<F> + Senders<P>,
{
    if !tables.checks_sources() {
        return Ok(());
    }
    let Aligned([src, _]) = F::ends(packet, L3).ok_or(DropReason::Truncated)?;
    let sender = tables.endpoint(&F::addr(src)).map_or(0, |endpoint| endpoint.ifindex());
    if sender == tables.sender(packet) {
        return Ok(());
    }
    // Read again: the stack is short, and this seldom happens.
    let Aligned([src, dst]) = F::ends(packet, L3).ok_or(DropReason::Truncated)?;
    if stays::<F>(&F::addr(src), &F::addr(dst)) { Ok(()) } else { Err(DropReason::SpoofedSource) }
}

/// Whether no router may send it on: from a link-local address or from none, to a link-local address or a group.
#[inline(always)]
fn stays<F: Errors>(src: &Addr, dst: &Addr) -> bool {
    F::CSUM_OFF.is_none()
        && (is_link_local(src) || src.is_unspecified())
        && (is_link_local(dst) || dst.bytes[0] == 0xff)
}

/// In fe80::/10 (RFC 4291 section 2.5.6).
#[inline(always)]
const fn is_link_local(addr: &Addr) -> bool {
    addr.bytes[0] == 0xfe && addr.bytes[1] & 0xc0 == 0x80
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use ferroflow_common::tcp::Flags;
    use ferroflow_common::verdict::Verdict;

    use super::*;
    use crate::frame::{Frame, Names, Part, both_families};
    use crate::tables::fake::Fake;

    both_families!(
        a_pod_sends_from_its_own_address_alone,
        every_packet_is_checked_whatever_it_is,
        where_it_is_off_everything_passes,
    );

    /// Pods 1 and 2 are here; packets come from pod 1.
    fn fake<F: Names>() -> Fake {
        let mut fake = Fake::default();
        fake.local(F::pod(1), 11);
        fake.local(F::pod(2), 12);
        fake.sender = Some(11);
        fake.service(F::vip(1), 80, ferroflow_common::addr::Proto::TCP, &[(F::pod(2), 8080)]);
        fake
    }

    fn a_pod_sends_from_its_own_address_alone<F: Names>() {
        let fake = fake::<F>();
        for dst in [F::vip(1), F::pod(2), F::pod(3), F::vip(99)] {
            let own = Frame::tcp((F::pod(1), 4000), (dst, 80), Flags::SYN);
            assert!(own.leave(&fake).is_ok());
            // Another pod's of this node, one's of another node, a node's, a service's, none.
            for src in [F::pod(2), F::pod(3), F::vip(200), F::vip(1), F::addr(F::from_words([0; 4]))] {
                let spoofed = own.clone().sent_from((src, 4000));
                assert_eq!(spoofed.leave(&fake), Err(DropReason::SpoofedSource), "{src}");
            }
        }
        assert_eq!(fake.tracked().len(), 2, "its own flow, and no other");
    }

    /// A flow that is known is no excuse: it is another pod's.
    fn every_packet_is_checked_whatever_it_is<F: Names>() {
        let mut fake = fake::<F>();
        fake.sender = Some(12);
        let flow = Frame::tcp((F::pod(2), 4000), (F::vip(1), 80), Flags::SYN);
        assert!(flow.leave(&fake).is_ok());
        fake.sender = Some(11);
        assert_eq!(flow.leave(&fake), Err(DropReason::SpoofedSource));
        let udp = Frame::udp((F::pod(2), 4000), (F::pod(3), 53)).payload(&[1; 16]);
        for part in [Part::First, Part::Later(16)] {
            assert_eq!(udp.clone().part(part).leave(&fake), Err(DropReason::SpoofedSource));
        }
        let echo = Frame::icmp(F::pod(2), F::pod(3), 8, 0);
        assert_eq!(echo.leave(&fake), Err(DropReason::SpoofedSource));
    }

    fn where_it_is_off_everything_passes<F: Names>() {
        let mut fake = fake::<F>();
        fake.sender = None;
        let other = Frame::tcp((F::pod(3), 4000), (F::vip(99), 80), Flags::SYN);
        assert_eq!(other.leave(&fake), Ok((Verdict::Stack, other.build())));
    }

    #[test]
    fn neighbours_and_groups_of_ipv6_are_reached_from_link_local_addresses_and_none() {
        let fake = fake::<ferroflow_common::family::V6>();
        let addr = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
        for (src, dst, passes) in [
            ("fe80::1", "ff02::1", true),
            ("fe80::1", "fe80::2", true),
            ("::", "ff02::1:ff00:1", true),
            ("febf::1", "ff02::16", true),
            ("fe80::1", "2001:db8::1", false),
            ("fe80::1", "fd00::1", false),
            ("::", "fd00::1", false),
            ("fec0::1", "ff02::1", false),
            ("fd00::99", "ff02::1", false),
        ] {
            let frame = Frame::icmp(addr(src), addr(dst), 135, 0);
            let expected =
                if passes { Ok((Verdict::Stack, frame.build())) } else { Err(DropReason::SpoofedSource) };
            assert_eq!(frame.leave(&fake), expected, "{src} to {dst}");
        }
    }
}
