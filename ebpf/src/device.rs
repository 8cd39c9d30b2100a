//! What arrives at the node's own devices: clients of NodePorts and of addresses that lead here, and the replies of
//! backends on other nodes.

use ferroflow_common::family::{Family as _, V4, V6};
use ferroflow_common::verdict::{DropReason, Verdict};

use crate::conntrack::{self, Epoch, Flow};
use crate::judge;
use crate::lb;
use crate::nat::{self, Ends};
use crate::packet::{Packet, Reshape};
use crate::parse::{self, Parse};
use crate::route;
use crate::service::{self, Origin, Outcome, Way};
use crate::shadow;
use crate::steps::Steps;
use crate::tables::Tables;

/// A packet from outside the node.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn arriving<P, T>(packet: &mut P, tables: &T) -> Result<Verdict, DropReason>
where
    P: Reshape,
    T: Steps<V4, P> + Steps<V6, P>,
{
    arriving_from(packet, tables, Origin::Outside)
}

/// The same, by way of a tunnel: `origin` is [`Origin::Tunnel`] or [`Origin::Relay`].
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn arriving_from<P, T>(packet: &mut P, tables: &T, origin: Origin) -> Result<Verdict, DropReason>
where
    P: Reshape,
    T: Steps<V4, P> + Steps<V6, P>,
{
    match packet.ethertype() {
        V4::ETHERTYPE => service::in_steps::<V4, P, T>(packet, tables, origin),
        V6::ETHERTYPE => service::in_steps::<V6, P, T>(packet, tables, origin),
        _ => Ok(Verdict::Stack),
    }
}

/// A packet of a flow that is known, or of no service: what comes from a pod of another node goes to its pod, all else to
/// the stack.
///
/// # Errors
/// Why the packet is dropped.
#[inline(always)]
pub fn arrive<F, P, T>(packet: &mut P, tables: &T, way: Way, origin: Origin) -> Result<Outcome, DropReason>
where
    F: Parse,
    F::Bytes: Ends,
    P: Packet,
    T: Tables<F>,
{
    let Some(headers) = parse::headers_of::<F, P>(packet, way)? else { return Ok(Outcome::RARE) };
    match conntrack::follow::<F, T>(tables, &headers, way.halves(), Epoch::Compared) {
        // Where nothing is relayed any more it is opened anew.
        Flow::Known(to) if to.is_relayed_on() => {
            return Ok(if tables.relays() { Outcome::relay(to.node()) } else { Outcome::OPENS });
        }
        // What another node relays is for a service, whatever it looked like here.
        Flow::Known(to) if to.is_plain() && origin == Origin::Relay => return Ok(Outcome::OPENS),
        // As before it was known.
        Flow::Known(to) if to.is_plain() => {
            return Ok(Outcome::goes(route::inwards::<F, T>(tables, &headers.tuple)));
        }
        Flow::Known(to) => {
            nat::rewrite(packet, &headers, &to)?;
            return Ok(Outcome::goes(route::rewritten::<F, T>(tables, &to)));
        }
        Flow::Halved => return Ok(Outcome::HALVED),
        Flow::Stale => return Ok(Outcome::STALE),
        // The other node knows that it is for a service.
        Flow::Unknown if origin == Origin::Relay => return Ok(Outcome::OPENS),
        Flow::Unknown => {}
    }
    let mut key = lb::key::<F>(&headers.tuple);
    if lb::is_service(tables.frontend(&key)) {
        return Ok(if service::is_kernels(tables, &headers) { Outcome::STACK } else { Outcome::OPENS });
    }
    if let Some(index) = shadow::shadowed::<F, T>(tables, &headers) {
        return Ok(Outcome::shadowing(index));
    }
    let verdict = route::inwards::<F, T>(tables, &headers.tuple);
    if verdict != Verdict::Stack {
        // What policies have a say in is asked about where the stack hands it to the pod.
        let waits = judge::concerns::<F, T>(tables, &headers.tuple, Origin::Outside);
        return Ok(if waits { Outcome::STACK } else { Outcome::goes(verdict) });
    }
    if lb::is_service(lb::node_port(tables, &mut key)) {
        return Ok(if service::is_kernels(tables, &headers) { Outcome::STACK } else { Outcome::OPENS });
    }
    service::stray(tables, &mut key)
}

#[cfg(test)]
mod tests {
    use ferroflow_common::abi::lb::{Frontend, FrontendKey, ServiceClient};
    use ferroflow_common::abi::node::{NodeAddress, Settings};
    use ferroflow_common::abi::policy::EndpointPolicy;
    use ferroflow_common::addr::{Addr, Port, Proto};
    use ferroflow_common::tcp::Flags;

    use super::*;
    use crate::frame::{Frame, Names, both_families};
    use crate::tables::fake::Fake;

    both_families!(
        rule_26_a_node_port_masquerades_its_clients,
        rule_26_with_the_policy_local_the_client_is_kept,
        rule_26_a_backend_that_is_the_node_itself_sees_the_client,
        rule_22_source_ranges_come_first,
        what_is_for_no_service_is_the_stacks,
        a_port_of_the_host_keeps_its_clients_and_is_at_every_address,
        rule_28_no_packet_finds_a_port_of_a_loopback_address,
        without_an_address_of_the_family_nobody_is_masqueraded,
        what_comes_from_a_pod_of_another_node_goes_to_its_pod,
    );

    const SYN: u8 = Flags::SYN;
    const ACK: u8 = Flags::ACK;

    /// The node's own address, a client and a local and a remote pod; NodePort 30080 with one backend.
    struct Net {
        fake: Fake,
        node: Addr,
        client: (Addr, u16),
        backend: (Addr, u16),
    }

    impl Net {
        fn new<F: Names>(backend: Addr, flags: u32) -> Self {
            let mut fake = Fake::default();
            let node = F::vip(200);
            let any = if node.is_v4() { FrontendKey::NODE_V4 } else { FrontendKey::NODE_V6 };
            fake.node.insert(node, NodeAddress { flags: NodeAddress::NODE_PORTS });
            fake.service(any, 30_080, Proto::TCP, &[(backend, 8080)]).flags = Frontend::NORTH_SOUTH | flags;
            fake.local(F::pod(1), 11);
            Self { fake, node, client: (F::vip(99), 4000), backend: (backend, 8080) }
        }

        fn request(&self, flags: u8) -> Frame {
            Frame::tcp(self.client, (self.node, 30_080), flags)
        }

        /// The request as the backend gets it.
        fn arrives(&self, flags: u8, verdict: Verdict) -> Frame {
            let (found, bytes) = self.request(flags).arrive(&self.fake).unwrap();
            let entry = self.fake.entry(self.client, (self.node, 30_080), Proto::TCP).unwrap();
            let there =
                self.request(flags).sent_from((entry.src, entry.src_port.host())).sent_to(self.backend);
            assert_eq!((found, bytes), (verdict, there.build()));
            there
        }
    }

    fn rule_26_a_node_port_masquerades_its_clients<F: Names>() {
        // A remote backend answers to the node, a local one on its interface.
        let net = Net::new::<F>(F::pod(2), 0);
        let there = net.arrives(SYN, Verdict::Forward);
        assert_eq!(there.src, net.node);
        assert!((1024..30_000).contains(&there.src_port));
        let answer = (Verdict::Forward, net.request(SYN).answer(SYN | ACK).build());
        assert_eq!(there.answer(SYN | ACK).arrive(&net.fake), Ok(answer));
        assert_eq!(net.arrives(ACK, Verdict::Forward).src_port, there.src_port, "the flow keeps its port");
        let net = Net::new::<F>(F::pod(1), 0);
        let there = net.arrives(SYN, Verdict::Pod { ifindex: 11 });
        let answer = (Verdict::Forward, net.request(SYN).answer(SYN | ACK).build());
        assert_eq!(
            there.answer(SYN | ACK).leave(&net.fake),
            Ok(answer),
            "past the stack: the source is its own"
        );
    }

    fn rule_26_with_the_policy_local_the_client_is_kept<F: Names>() {
        let net = Net::new::<F>(F::pod(1), Frontend::KEEP_CLIENT);
        let there = net.arrives(SYN, Verdict::Pod { ifindex: 11 });
        assert_eq!((there.src, there.src_port), net.client);
    }

    fn rule_26_a_backend_that_is_the_node_itself_sees_the_client<F: Names>() {
        let net = Net::new::<F>(F::vip(200), 0);
        let there = net.arrives(SYN, Verdict::Stack);
        assert_eq!((there.src, there.src_port), net.client, "a stack takes nothing from its own address");
        let back = there.answer(SYN | ACK).enter(&net.fake);
        assert_eq!(back, Ok((Verdict::Stack, net.request(SYN).answer(SYN | ACK).build())));
    }

    fn rule_22_source_ranges_come_first<F: Names>() {
        let mut net = Net::new::<F>(F::pod(1), Frontend::SOURCE_RANGES);
        assert_eq!(net.request(SYN).arrive(&net.fake), Err(DropReason::SourceRange));
        net.fake.ranges.push(ServiceClient { service: 1, addr: net.client.0 });
        net.arrives(SYN, Verdict::Pod { ifindex: 11 });
    }

    fn what_is_for_no_service_is_the_stacks<F: Names>() {
        let net = Net::new::<F>(F::pod(1), 0);
        for to in [(net.node, 22), (F::pod(1), 8080), (F::vip(201), 30_080)] {
            let frame = Frame::tcp(net.client, to, SYN);
            assert_eq!(frame.arrive(&net.fake), Ok((Verdict::Stack, frame.build())));
        }
    }

    fn what_comes_from_a_pod_of_another_node_goes_to_its_pod<F: Names>() {
        let mut fake = Fake::default();
        fake.local(F::pod(1), 11);
        let frame = Frame::tcp((F::pod(3), 4000), (F::pod(1), 8080), SYN);
        let stack = Ok((Verdict::Stack, frame.build()));
        assert_eq!(frame.arrive(&fake), stack, "there is no route of ours back");
        fake.elsewhere.push(F::pod(3));
        assert_eq!(frame.arrive(&fake), Ok((Verdict::Pod { ifindex: 11 }, frame.build())));
        let nobodys = frame.clone().sent_to((F::pod(2), 8080));
        assert_eq!(nobodys.arrive(&fake), Ok((Verdict::Stack, nobodys.build())));
        fake.settings = Some(Settings { flags: Settings::MIGRATING, ..Settings::NONE });
        assert_eq!(frame.arrive(&fake), stack);
        fake.settings = Some(Settings { flags: Settings::POLICIES, ..Settings::NONE });
        fake.endpoints.get_mut(&F::pod(1)).unwrap().policy.ingress = EndpointPolicy::CLOSED;
        assert_eq!(frame.arrive(&fake), stack, "policies are asked at the pod's interface");
        assert!(fake.tracked().is_empty());
    }

    fn a_port_of_the_host_keeps_its_clients_and_is_at_every_address<F: Names>() {
        let mut net = Net::new::<F>(F::pod(1), Frontend::KEEP_CLIENT | Frontend::HOST_PORT);
        net.fake.node.insert(net.node, NodeAddress { flags: 0 });
        let there = net.arrives(SYN, Verdict::Pod { ifindex: 11 });
        assert_eq!((there.src, there.src_port), net.client);
        let answer = (Verdict::Forward, net.request(SYN).answer(SYN | ACK).build());
        assert_eq!(there.answer(SYN | ACK).leave(&net.fake), Ok(answer));
    }

    fn rule_28_no_packet_finds_a_port_of_a_loopback_address<F: Names>() {
        let mut net = Net::new::<F>(F::pod(1), 0);
        let loopback = if net.node.is_v4() { "127.0.0.1" } else { "::1" };
        let addr = Addr::from(loopback.parse::<core::net::IpAddr>().unwrap());
        let key = FrontendKey { addr, port: Port::new(81), proto: Proto::TCP, scope: FrontendKey::OWN };
        let row = *net.fake.service(addr, 81, Proto::TCP, &[net.backend]);
        net.fake.frontends.remove(&FrontendKey { scope: FrontendKey::EXTERNAL, ..key });
        net.fake.frontends.insert(key, row);
        let frame = Frame::tcp(net.client, (addr, 81), SYN);
        assert_eq!(frame.arrive(&net.fake), Ok((Verdict::Stack, frame.build())), "which drops it");
    }

    fn without_an_address_of_the_family_nobody_is_masqueraded<F: Names>() {
        let mut net = Net::new::<F>(F::pod(1), 0);
        net.fake.service(F::vip(1), 80, Proto::TCP, &[net.backend]);
        net.fake.node.clear();
        let frame = Frame::tcp(net.client, (F::vip(1), 80), SYN);
        assert_eq!(frame.arrive(&net.fake), Err(DropReason::NoMasquerade));
        assert!(net.fake.tracked().is_empty());
    }
}
