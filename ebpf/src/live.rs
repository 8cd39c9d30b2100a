//! Live flows when policies have changed.
//!
//! By default what is established goes on (rule 52). Pods that want it otherwise have [`EndpointPolicy::CUT`] in their
//! rows, and when what is allowed them changes, the agent writes another [`Settings::epoch`]:
//!
//! ```text
//!   known, of this epoch ---------------------------------------------------------------> known
//!   known, of another one -- judge again: by who opened it, whichever way the packet goes --> known, of this epoch
//!                                  +-- not allowed: dropped, like every packet after it, both ways
//! ```
//!
//! The flow as a whole is judged: the backend that was chosen, and the client before any masquerade. Neither end is told;
//! a TCP client sees silence and times out. What was dropped keeps its epoch, so it goes on as soon as policies allow it
//! again, and it expires like any idle flow. While nobody's live flows are cut there is one epoch, and this costs one
//! comparison a packet.
//!
//! [`Settings::epoch`]: ferroflow_common::abi::node::Settings::epoch
//! [`EndpointPolicy::CUT`]: ferroflow_common::abi::policy::EndpointPolicy::CUT

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::addr::{Addr, Port};
use ferroflow_common::family::Family;

use crate::tables::{Aligned, Tables, Tracked as _};

/// Who opened a known flow, to whom, and that one's port. `None` where no policy has a say in it.
#[inline(always)]
pub(crate) fn ends<F: Family, T: Tables<F>>(
    tables: &T,
    tuple: &Aligned<Tuple<F::Bytes>>,
) -> Option<(Addr, Addr, Port)> {
    let row = tables.tracked(tuple)?;
    let entry = row.load();
    if entry.flags & Entry::EXEMPT != 0 {
        row.store_epoch(tables.epoch());
        return None;
    }
    let peer = F::addr(tuple.src);
    Some(if entry.kind == Entry::FORWARD {
        (peer, entry.dst, entry.dst_port)
    } else {
        (entry.dst, peer, tuple.src_port)
    })
}

/// The flow was asked about in this epoch.
#[inline(always)]
pub(crate) fn mark<F: Family, T: Tables<F>>(tables: &T, tuple: &Aligned<Tuple<F::Bytes>>, epoch: u32) {
    if let Some(row) = tables.tracked(tuple) {
        row.store_epoch(epoch);
    }
}

/// Whether the ports say that the supposed server is the client: only clients have ports that no one chose
/// (`net.ipv4.ip_local_port_range`, 32768 and above unless somebody changed it).
#[inline(always)]
pub(crate) const fn are_exchanged(client: Port, server: Port) -> bool {
    client.host() < EPHEMERAL && server.host() >= EPHEMERAL
}

const EPHEMERAL: u16 = 32_768;

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::lb::Frontend;
    use ferroflow_common::abi::node::{NodeAddress, Settings};
    use ferroflow_common::abi::policy::{EndpointPolicy, PolicyKey, PortRange, Verdict};
    use ferroflow_common::addr::Proto;
    use ferroflow_common::tcp::Flags;
    use ferroflow_common::verdict::DropReason;

    use crate::frame::{Frame, Names, both_families};
    use crate::service::Origin;
    use crate::tables::fake::Fake;

    both_families!(
        rule_52_a_flow_that_is_cut_is_dropped_both_ways_and_goes_on_when_it_may,
        rule_52_a_flow_through_a_service_is_judged_by_client_and_backend,
        rule_52_flows_of_other_pods_finish,
        rule_52_what_was_never_tracked_is_cut_by_its_ports,
        rule_49_what_the_node_opened_is_never_cut,
        rule_35_a_connection_that_is_opened_anew_is_new,
        echoes_are_cut,
        without_another_epoch_a_known_flow_asks_nothing,
    );

    const SYN: u8 = Flags::SYN;
    const ACK: u8 = Flags::ACK;
    const SET: u32 = 5;

    /// Pods 1 and 2 of this node, of which pod 2 lets in what `SET` says; pod 3 of another.
    fn net<F: Names>(live: u32) -> Fake {
        let mut fake = Fake::default();
        fake.local(F::pod(1), 11);
        fake.local(F::pod(2), 12);
        fake.settings = Some(Settings { flags: Settings::POLICIES, ..Settings::NONE });
        let policy = EndpointPolicy { ingress: SET, egress: EndpointPolicy::OPEN, adopts_until: 0, live };
        fake.endpoints.get_mut(&F::pod(2)).unwrap().policy = policy;
        say(&mut fake, Verdict::Allow);
        fake
    }

    /// Port 80 of all protocols with ports, and all that has none; or nothing.
    fn say(fake: &mut Fake, verdict: Verdict) {
        let range = |proto| PortRange { first: 80, last: 80, proto, verdict: verdict as u8, cause: 0 };
        fake.policies.lay(SET, PolicyKey::OTHERS, verdict, &[Proto::TCP, Proto::UDP, Proto::SCTP].map(range));
    }

    /// As the agent does where something was taken away or given.
    fn change(fake: &mut Fake, verdict: Verdict) {
        say(fake, verdict);
        fake.settings.as_mut().unwrap().epoch += 1;
    }

    fn requests<F: Names>(from: u8) -> [Frame; 3] {
        let (client, server) = ((F::pod(from), 40_000), (F::pod(2), 80));
        let (tcp, udp) = (Frame::tcp(client, server, SYN), Frame::udp(client, server));
        [tcp, udp, Frame::sctp(client, server, ferroflow_common::tcp::chunk::INIT)]
    }

    /// What follows a first packet.
    fn next(first: &Frame) -> Frame {
        if first.proto() == Proto::TCP {
            Frame::tcp((first.src, first.src_port), (first.dst, first.dst_port), ACK)
        } else if first.proto() == Proto::SCTP {
            let data = ferroflow_common::tcp::chunk::DATA;
            Frame::sctp((first.src, first.src_port), (first.dst, first.dst_port), data)
        } else {
            first.clone()
        }
    }

    fn rule_52_a_flow_that_is_cut_is_dropped_both_ways_and_goes_on_when_it_may<F: Names>() {
        for first in requests::<F>(1) {
            let mut fake = net::<F>(EndpointPolicy::CUT);
            let (there, back) = (next(&first), first.answer(ACK));
            assert!(first.leave(&fake).is_ok() && back.leave(&fake).is_ok());
            change(&mut fake, Verdict::Deny);
            for _ in 0..2 {
                assert_eq!(back.leave(&fake), Err(DropReason::PolicyIngress), "{back:?}");
                assert_eq!(there.leave(&fake), Err(DropReason::PolicyIngress), "{there:?}");
            }
            change(&mut fake, Verdict::Allow);
            for _ in 0..2 {
                assert!(there.leave(&fake).is_ok() && back.leave(&fake).is_ok());
            }
            // One of another node: seen at the pod's interface alone.
            let from_far = Frame { src: F::pod(3), ..first.clone() };
            let (far_there, far_back) = (next(&from_far), from_far.answer(ACK));
            assert!(from_far.enter_pod(&fake, Origin::Inward).is_ok() && far_back.leave(&fake).is_ok());
            change(&mut fake, Verdict::Deny);
            assert_eq!(far_there.enter_pod(&fake, Origin::Inward), Err(DropReason::PolicyIngress));
            assert_eq!(far_back.leave(&fake), Err(DropReason::PolicyIngress));
        }
    }

    fn rule_52_a_flow_through_a_service_is_judged_by_client_and_backend<F: Names>() {
        let mut fake = net::<F>(EndpointPolicy::CUT);
        let vip = F::vip(1);
        fake.service(vip, 8080, Proto::TCP, &[(F::pod(2), 80)]).flags = Frontend::REJECT;
        let request = Frame::tcp((F::pod(1), 40_000), (vip, 8080), SYN);
        let there = Frame::tcp((F::pod(1), 40_000), (vip, 8080), ACK);
        let back = Frame::tcp((F::pod(2), 80), (F::pod(1), 40_000), ACK);
        assert!(request.leave(&fake).is_ok() && back.leave(&fake).is_ok());
        change(&mut fake, Verdict::Deny);
        assert_eq!(there.leave(&fake), Err(DropReason::PolicyIngress));
        assert_eq!(back.leave(&fake), Err(DropReason::PolicyIngress));
        change(&mut fake, Verdict::Allow);
        assert_eq!(
            there.leave(&fake).map(|(_, bytes)| bytes),
            Ok(there.clone().sent_to((F::pod(2), 80)).build())
        );
        assert_eq!(
            back.leave(&fake).map(|(_, bytes)| bytes),
            Ok(back.clone().sent_from((vip, 8080)).build())
        );
    }

    fn rule_52_flows_of_other_pods_finish<F: Names>() {
        for first in requests::<F>(1) {
            let mut fake = net::<F>(EndpointPolicy::FINISH);
            assert!(first.leave(&fake).is_ok() && first.answer(ACK).leave(&fake).is_ok());
            change(&mut fake, Verdict::Deny);
            assert!(next(&first).leave(&fake).is_ok() && first.answer(ACK).leave(&fake).is_ok());
        }
    }

    fn rule_52_what_was_never_tracked_is_cut_by_its_ports<F: Names>() {
        for first in requests::<F>(1).into_iter().filter(|it| it.proto().connects()) {
            for (live, passes) in [(EndpointPolicy::FINISH, true), (EndpointPolicy::CUT, false)] {
                let mut fake = net::<F>(live);
                say(&mut fake, Verdict::Deny);
                for frame in [next(&first), next(&first).answer(ACK)] {
                    // Pod 2 may have opened it, for all that policies know.
                    assert_eq!(frame.leave(&fake).is_ok(), passes, "{live}: {frame:?}");
                    fake.conntrack.take();
                }
                let outward = Frame { src_port: 40_000, dst_port: 443, ..next(&first).answer(ACK) };
                assert!(outward.leave(&fake).is_ok(), "what it opened itself goes on");
            }
        }
    }

    fn rule_49_what_the_node_opened_is_never_cut<F: Names>() {
        for first in requests::<F>(1) {
            let mut fake = net::<F>(EndpointPolicy::CUT);
            let node = F::vip(200);
            fake.node.insert(node, NodeAddress { flags: 0 });
            let first = Frame { src: node, ..first };
            change(&mut fake, Verdict::Deny);
            assert!(first.enter_pod(&fake, Origin::Own).is_ok());
            change(&mut fake, Verdict::Deny);
            for _ in 0..2 {
                assert!(first.answer(ACK).leave(&fake).is_ok());
                assert!(next(&first).enter_pod(&fake, Origin::Own).is_ok());
            }
            let forged = Frame { src_port: 40_001, ..first };
            assert_eq!(forged.enter_pod(&fake, Origin::Inward), Err(DropReason::PolicyIngress));
        }
    }

    fn rule_35_a_connection_that_is_opened_anew_is_new<F: Names>() {
        let mut fake = net::<F>(EndpointPolicy::CUT);
        let [first, ..] = requests::<F>(1);
        assert!(first.leave(&fake).is_ok() && first.answer(SYN | ACK).leave(&fake).is_ok());
        change(&mut fake, Verdict::Deny);
        assert_eq!(first.leave(&fake), Err(DropReason::PolicyIngress));
        change(&mut fake, Verdict::Allow);
        assert!(first.leave(&fake).is_ok());
    }

    fn echoes_are_cut<F: Names>() {
        let (request, reply) = if F::pod(1).is_v4() { (8, 0) } else { (128, 129) };
        let identifier = [0, 7, 0, 1];
        let mut fake = net::<F>(EndpointPolicy::CUT);
        let there = Frame::icmp(F::pod(1), F::pod(2), request, 0).payload(&identifier);
        let back = Frame::icmp(F::pod(2), F::pod(1), reply, 0).payload(&identifier);
        assert!(there.leave(&fake).is_ok() && back.leave(&fake).is_ok());
        change(&mut fake, Verdict::Deny);
        assert_eq!(back.leave(&fake), Err(DropReason::PolicyIngress));
        assert_eq!(there.leave(&fake), Err(DropReason::PolicyIngress));
    }

    fn without_another_epoch_a_known_flow_asks_nothing<F: Names>() {
        let mut fake = net::<F>(EndpointPolicy::CUT);
        let [first, ..] = requests::<F>(1);
        assert!(first.leave(&fake).is_ok() && first.answer(SYN | ACK).leave(&fake).is_ok());
        assert!(next(&first).leave(&fake).is_ok());
        fake.lookups.take();
        assert!(next(&first).leave(&fake).is_ok());
        let usual = fake.lookups.take().hash;
        assert_eq!(usual, 2, "its flow, and the pod that it goes to");
        change(&mut fake, Verdict::Allow);
        assert!(next(&first).leave(&fake).is_ok());
        assert!(fake.lookups.take().hash > usual);
        assert!(next(&first).leave(&fake).is_ok());
        assert_eq!(fake.lookups.take().hash, usual);
    }
}
