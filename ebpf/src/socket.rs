//! Services translated where a socket names its peer: the packets then go to the backend by themselves.
//!
//! A pod's socket is translated where that is simple, and otherwise left alone: the packet path then passes or refuses
//! what it sends. What the host's own processes send does not cross the packet path, so everything is decided here:
//!
//! | the host's socket names | it gets |
//! | --- | --- |
//! | a ClusterIP, a load balancer's or an external address | a backend, of all (rule 16) |
//! | a NodePort on an own address that serves them, or on a loopback address (rule 28) | the same |
//! | a port of the host that leads to a pod, on an own address or on a loopback address | that pod |
//! | a NodePort on another node, or another port of such an address (rules 17 and 21) | what it named |
//! | a service without endpoints, another port of a ClusterIP | a refusal at once (rules 14 and 19) |
//! | an address of the service range that is nobody's | an error at once (rule 19) |
//! | one whose endpoints or source ranges are not for it (rules 15 and 22) | an error at once |
//!
//! 0.0.0.0 and :: are loopback addresses here, as they are to the kernel. A socket that is itself bound to a loopback
//! address is left alone: the kernel sends nothing from there to another host, so it would lose an error that is clear
//! (nobody listens: connection refused) for one that is not.

use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey, ServiceClient};
use ferroflow_common::abi::node::Settings;
use ferroflow_common::abi::socket::Translation;
use ferroflow_common::addr::{Addr, Port, Proto};
use ferroflow_common::family::{Family as _, V4, V6};
use ferroflow_common::verdict::DropReason;

use crate::lb::{self, Choice};
use crate::service::{self, Outcome};
use crate::tables::{Services, Tables};

/// Where a socket wants to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub addr: Addr,
    pub port: Port,
    pub proto: Proto,
}

/// What becomes of the system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// It goes on as it is.
    Leave,
    /// It goes to a backend.
    Translate,
    /// Nobody is there (rule 14).
    Refuse,
    /// It fails.
    Deny,
}

/// A verb and its number, both always said: what an enum's variants do not use the compiler leaves to chance, and the
/// verifier refuses to move that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub verb: Verb,
    /// To translate: the backend's index. To deny: the [`DropReason`].
    pub number: u32,
}

impl Decision {
    pub const LEAVE: Self = Self { verb: Verb::Leave, number: 0 };
    pub const REFUSE: Self = Self { verb: Verb::Refuse, number: 0 };

    #[inline(always)]
    pub const fn translate(index: u32) -> Self {
        Self { verb: Verb::Translate, number: index }
    }

    #[inline(always)]
    pub const fn deny(reason: DropReason) -> Self {
        Self { verb: Verb::Deny, number: reason as u32 }
    }
}

/// The backend for a socket of this node that names its peer.
///
/// `bound` is the address that the socket is bound to, unspecified where that is none; `known` is what it remembers of
/// this peer; `entropy` stands in for the flow's hash, since the source port need not be known yet.
#[inline(always)]
pub fn host<T: Tables<V4> + Tables<V6>>(
    tables: &T,
    peer: &Peer,
    bound: Addr,
    known: Option<Translation>,
    entropy: u32,
) -> Decision {
    let mut key = key(peer);
    let Some(frontend) = host_frontend(tables, &mut key) else { return stray(tables, &mut key) };
    if bound.is_loopback() {
        return Decision::LEAVE;
    }
    if let Some(known) = known
        && serves(tables, &known)
    {
        return Decision::translate(known.index);
    }
    let frontend = lb::internal(tables, frontend, &mut key);
    // All processes of the host are one client (rule 29).
    let own = own_address(tables, &peer.addr);
    let source = if bound.is_unspecified() { own } else { bound };
    if frontend.flags & Frontend::SOURCE_RANGES != 0
        && !tables.allows(&ServiceClient { service: frontend.service, addr: source })
    {
        return Decision::deny(DropReason::SourceRange);
    }
    match lb::kept_or_chosen(tables, &frontend, own, Tables::<V4>::now(tables), || entropy) {
        Ok(Some(index)) => Decision::translate(index),
        Ok(None) => Decision::REFUSE,
        // It stopped serving between two looks at the tables, which name another by now.
        Err(DropReason::NoBackend) => chosen_again(tables, &key, entropy),
        Err(reason) => Decision::deny(reason),
    }
}

#[inline(always)]
fn chosen_again<T: Services>(tables: &T, key: &FrontendKey, entropy: u32) -> Decision {
    let Some(frontend) = tables.frontend(key) else { return Decision::deny(DropReason::NoBackend) };
    match lb::choose(tables, &frontend, entropy) {
        Ok(Choice::Backend { index, .. }) => Decision::translate(index),
        Ok(Choice::Reject) => Decision::REFUSE,
        Err(reason) => Decision::deny(reason),
    }
}

/// The same for a socket of a pod: it is translated, or left to the packet path.
#[inline(always)]
pub fn pod<T: Services>(tables: &T, peer: &Peer, known: Option<Translation>, entropy: u32) -> Decision {
    // To a pod as to the host it is the loopback, but the keys of NodePorts look like it (rule 28).
    if peer.addr.is_unspecified() {
        return Decision::LEAVE;
    }
    let mut key = key(peer);
    let Some(frontend) = tables.frontend(&key) else { return Decision::LEAVE };
    // Affinity and source ranges go by the client's address, which a socket need not have yet; and nobody could tell
    // when a connection that is translated here ends.
    let by_packet = Frontend::SOURCE_RANGES | Frontend::LEAST_CONNECTION;
    if frontend.affinity != 0 || frontend.flags & by_packet != 0 {
        return Decision::LEAVE;
    }
    // A socket cannot stand in for its client (rule 26 e).
    if tables.settings() & Settings::MASQUERADE_ALL != 0 {
        return Decision::LEAVE;
    }
    if let Some(known) = known
        && serves(tables, &known)
    {
        return Decision::translate(known.index);
    }
    let frontend = lb::internal(tables, frontend, &mut key);
    match lb::choose(tables, &frontend, entropy) {
        Ok(Choice::Backend { index, .. }) => Decision::translate(index),
        Ok(Choice::Reject) | Err(_) => Decision::LEAVE,
    }
}

/// What is for no service: [`service::stray`] for the host's own (rule 19).
#[inline(always)]
fn stray<T: Services>(tables: &T, key: &mut FrontendKey) -> Decision {
    match service::stray(tables, key) {
        Ok(Outcome::REFUSED) => Decision::REFUSE,
        Ok(_) => Decision::LEAVE,
        Err(reason) => Decision::deny(reason),
    }
}

#[inline(always)]
fn key(peer: &Peer) -> FrontendKey {
    let Peer { addr, port, proto } = *peer;
    FrontendKey { addr, port, proto, scope: FrontendKey::EXTERNAL }
}

#[inline(always)]
fn host_frontend<T: Services>(tables: &T, key: &mut FrontendKey) -> Option<Frontend> {
    if key.addr.is_loopback() || key.addr.is_unspecified() {
        key.scope = FrontendKey::OWN;
        if let Some(frontend) = tables.frontend(key) {
            return Some(frontend);
        }
        key.scope = FrontendKey::EXTERNAL;
        return lb::node_row(tables, key);
    }
    match tables.frontend(key) {
        Some(frontend) => Some(frontend),
        None => lb::node_port(tables, key),
    }
}

/// This node's own address of the family of `addr`.
#[inline(always)]
fn own_address<T: Tables<V4> + Tables<V6>>(tables: &T, addr: &Addr) -> Addr {
    if addr.is_v4() {
        V4::addr(Tables::<V4>::masquerade(tables))
    } else {
        V6::addr(Tables::<V6>::masquerade(tables))
    }
}

/// What a socket that goes from this peer to this backend remembers.
#[inline(always)]
pub fn translation<T: Services>(tables: &T, peer: &Peer, index: u32) -> Option<Translation> {
    // Where it was released since it was chosen, its new generation would keep the socket there.
    let backend = tables.backend(index).filter(|backend| backend.flags & Backend::LIVE != 0)?;
    Some(Translation {
        frontend: peer.addr,
        backend: backend.addr,
        frontend_port: peer.port,
        backend_port: backend.port,
        index,
        generation: backend.generation,
    })
}

/// A choice holds until the backend stops serving (rule 31).
#[inline(always)]
fn serves<T: Services>(tables: &T, known: &Translation) -> bool {
    tables.backend(known.index).is_some_and(|backend| backend.generation == known.generation)
}

/// Who the application shall see as its peer: the service, where the socket's traffic is with the backend.
#[inline(always)]
pub fn seen(known: &Translation, addr: Addr, port: Port) -> Option<(Addr, Port)> {
    is_backend(known, addr, port).then_some((known.frontend, known.frontend_port))
}

/// Whether the socket's traffic with this address is a service's.
#[inline(always)]
pub fn is_backend(known: &Translation, addr: Addr, port: Port) -> bool {
    known.index != 0 && known.backend == addr && known.backend_port == port
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use ferroflow_common::abi::lb::{AffinityKey, Slot};
    use ferroflow_common::abi::node::NodeAddress;

    use super::*;
    use crate::frame::{Names, both_families};
    use crate::tables::fake::{Fake, Release};

    both_families!(
        a_service_becomes_its_backend_and_is_seen_as_itself,
        what_a_pod_needs_the_packet_path_for_is_left_to_it,
        rules_14_and_15_the_host_is_refused_or_denied_at_once,
        rule_31_a_backend_released_under_a_call_costs_nothing_and_keeps_nobody,
        rules_16_and_18_the_host_uses_the_internal_row,
        rules_17_24_and_25_node_ports_are_on_the_hosts_serving_addresses,
        rule_21_other_ports_of_a_service_address_are_left_alone,
        rule_22_ranges_admit_the_host_by_its_own_address,
        rule_28_the_loopback_serves_node_ports_to_the_host_only,
        rule_28_a_port_of_a_loopback_address_is_the_hosts_alone,
        rule_28_what_is_bound_to_the_loopback_is_left_alone,
        rule_29_all_processes_of_the_host_are_one_client,
        rules_31_to_33_a_datagram_socket_moves_when_its_backend_stops_serving,
    );

    const NODE_PORT: u16 = 30_080;

    fn own<F: Names>() -> Addr {
        F::vip(200)
    }

    fn node_row<F: Names>() -> Addr {
        if F::vip(1).is_v4() { FrontendKey::NODE_V4 } else { FrontendKey::NODE_V6 }
    }

    fn loopbacks<F: Names>() -> [Addr; 2] {
        if F::vip(1).is_v4() {
            [Addr::v4([127, 0, 0, 1]), Addr::v4([127, 9, 9, 9])]
        } else {
            let mut one = Addr::UNSPECIFIED;
            one.bytes[15] = 1;
            [one, one]
        }
    }

    fn unspecified<F: Names>() -> Addr {
        if F::vip(1).is_v4() { Addr::v4([0; 4]) } else { Addr::UNSPECIFIED }
    }

    /// A ClusterIP and a NodePort with two backends each, on a node with one address that serves NodePorts.
    fn tables<F: Names>() -> Fake {
        let mut fake = Fake::default();
        fake.node.insert(own::<F>(), NodeAddress { flags: NodeAddress::NODE_PORTS });
        let backends = [(F::pod(1), 8080), (F::pod(2), 8080)];
        fake.service(F::vip(1), 80, Proto::TCP, &backends);
        fake.service(node_row::<F>(), NODE_PORT, Proto::TCP, &backends).flags |= Frontend::NORTH_SOUTH;
        for backend in &mut fake.backends {
            backend.flags |= Backend::CLUSTER;
        }
        fake
    }

    fn rule_28_a_port_of_a_loopback_address_is_the_hosts_alone<F: Names>() {
        let mut fake = tables::<F>();
        let [loopback, _] = loopbacks::<F>();
        let row = *fake.service(loopback, NODE_PORT, Proto::TCP, &[(F::pod(3), 8080)]);
        let key = FrontendKey {
            addr: loopback,
            port: Port::new(NODE_PORT),
            proto: Proto::TCP,
            scope: FrontendKey::EXTERNAL,
        };
        fake.frontends.remove(&key);
        fake.frontends.insert(FrontendKey { scope: FrontendKey::OWN, ..key }, row);
        assert_eq!(
            backend(&fake, host_to::<F>(&fake, loopback, NODE_PORT)),
            F::pod(3),
            "before the NodePort"
        );
        assert_eq!(backend(&fake, host_to::<F>(&fake, own::<F>(), NODE_PORT)), F::pod(1), "another address");
        assert_eq!(pod_to(&fake, loopback, NODE_PORT), Decision::LEAVE, "a pod's loopback is its own");
        let udp = Peer { proto: Proto::UDP, ..tcp(loopback, NODE_PORT) };
        assert_eq!(host(&fake, &udp, unspecified::<F>(), None, 0), Decision::LEAVE);
    }

    fn tcp(addr: Addr, port: u16) -> Peer {
        Peer { addr, port: Port::new(port), proto: Proto::TCP }
    }

    fn host_to<F: Names>(fake: &Fake, addr: Addr, port: u16) -> Decision {
        host(fake, &tcp(addr, port), unspecified::<F>(), None, 0)
    }

    fn pod_to(fake: &Fake, addr: Addr, port: u16) -> Decision {
        pod(fake, &tcp(addr, port), None, 0)
    }

    /// The pod that a socket is sent to.
    #[track_caller]
    fn backend(fake: &Fake, decision: Decision) -> Addr {
        assert_eq!(decision.verb, Verb::Translate, "{decision:?}");
        fake.backends[decision.number as usize].addr
    }

    fn a_service_becomes_its_backend_and_is_seen_as_itself<F: Names>() {
        let fake = tables::<F>();
        for decision in [host_to::<F>(&fake, F::vip(1), 80), pod_to(&fake, F::vip(1), 80)] {
            let known = translation(&fake, &tcp(F::vip(1), 80), decision.number).unwrap();
            assert_eq!((known.backend, known.backend_port), (F::pod(1), Port::new(8080)));
            assert_eq!(seen(&known, F::pod(1), Port::new(8080)), Some((F::vip(1), Port::new(80))));
            assert_eq!(seen(&known, F::pod(1), Port::new(80)), None, "another port of the pod is itself");
        }
    }

    fn what_a_pod_needs_the_packet_path_for_is_left_to_it<F: Names>() {
        let mut fake = tables::<F>();
        fake.service(F::vip(2), 80, Proto::TCP, &[]);
        fake.service(F::vip(3), 80, Proto::TCP, &[(F::pod(1), 8080)]).affinity = 100;
        fake.service(F::vip(4), 80, Proto::TCP, &[(F::pod(1), 8080)]).flags = Frontend::SOURCE_RANGES;
        fake.service(F::vip(7), 80, Proto::TCP, &[(F::pod(1), 8080)]).flags = Frontend::LEAST_CONNECTION;
        let left = [F::vip(2), F::vip(3), F::vip(4), F::vip(7)].map(|vip| (vip, 80));
        for (addr, port) in left.into_iter().chain([(F::pod(1), 8080), (own::<F>(), NODE_PORT)]) {
            assert_eq!(pod_to(&fake, addr, port), Decision::LEAVE, "{addr}:{port}");
        }
        assert_ne!(pod_to(&fake, F::vip(1), 80), Decision::LEAVE);
        fake.settings = Some(Settings { flags: Settings::MASQUERADE_ALL, ..Settings::NONE });
        assert_eq!(pod_to(&fake, F::vip(1), 80), Decision::LEAVE, "rule 26 e");
    }

    fn rules_14_and_15_the_host_is_refused_or_denied_at_once<F: Names>() {
        let mut fake = tables::<F>();
        fake.service(F::vip(2), 80, Proto::TCP, &[]);
        assert_eq!(host_to::<F>(&fake, F::vip(2), 80), Decision::REFUSE);
        fake.service(F::vip(2), 81, Proto::TCP, &[]).flags = Frontend::LOCAL;
        assert_eq!(host_to::<F>(&fake, F::vip(2), 81), Decision::deny(DropReason::NoLocalEndpoint));
        const NOBODY: Slot = 0;
        fake.slots.fill(NOBODY);
        assert_eq!(host_to::<F>(&fake, F::vip(1), 80), Decision::deny(DropReason::NoBackend));
    }

    fn rule_31_a_backend_released_under_a_call_costs_nothing_and_keeps_nobody<F: Names>() {
        for looks in 0..3 {
            let mut fake = tables::<F>();
            let old = fake.slots[0];
            let instead = fake.backends.len() as u32;
            fake.backends.push(fake.backends[old as usize]);
            fake.slots.fill(old);
            fake.release = Some(Release { index: old, instead, looks: Cell::new(looks) });
            let decision = host_to::<F>(&fake, F::vip(1), 80);
            assert_eq!(decision.verb, Verb::Translate, "after {looks} looks");
            let peer = Peer { addr: F::vip(1), port: Port::new(80), proto: Proto::TCP };
            let found = translation(&fake, &peer, decision.number);
            assert!(found.is_none_or(|it| it.generation == 1), "after {looks} looks: {found:?}");
        }
    }

    fn rules_16_and_18_the_host_uses_the_internal_row<F: Names>() {
        let mut fake = tables::<F>();
        for (addr, port) in [(F::vip(5), 80), (node_row::<F>(), 30_081)] {
            let external = fake.service(addr, port, Proto::TCP, &[]);
            external.flags = Frontend::INTERNAL_ROW | Frontend::LOCAL | Frontend::NORTH_SOUTH;
            let internal = Frontend { length: 1, offset: 1, flags: Frontend::NORTH_SOUTH, ..*external };
            let scope = FrontendKey::INTERNAL;
            let key = FrontendKey { addr, port: Port::new(port), proto: Proto::TCP, scope };
            fake.frontends.insert(key, internal);
        }
        assert_eq!(backend(&fake, host_to::<F>(&fake, F::vip(5), 80)), F::pod(2), "not dropped (rule 15)");
        assert_eq!(backend(&fake, host_to::<F>(&fake, own::<F>(), 30_081)), F::pod(2));
        assert_eq!(backend(&fake, host_to::<F>(&fake, loopbacks::<F>()[0], 30_081)), F::pod(2));
    }

    fn rules_17_24_and_25_node_ports_are_on_the_hosts_serving_addresses<F: Names>() {
        let mut fake = tables::<F>();
        let (second, other_node) = (F::vip(201), F::vip(202));
        assert_eq!(backend(&fake, host_to::<F>(&fake, own::<F>(), NODE_PORT)), F::pod(1));
        assert_eq!(host_to::<F>(&fake, second, NODE_PORT), Decision::LEAVE, "not the node's");
        fake.node.insert(second, NodeAddress { flags: 0 });
        assert_eq!(host_to::<F>(&fake, second, NODE_PORT), Decision::LEAVE, "the node's, and serves none");
        fake.node.insert(second, NodeAddress { flags: NodeAddress::NODE_PORTS });
        assert_eq!(backend(&fake, host_to::<F>(&fake, second, NODE_PORT)), F::pod(1));
        fake.node.remove(&second);
        assert_eq!(host_to::<F>(&fake, second, NODE_PORT), Decision::LEAVE, "gone");
        assert_eq!(host_to::<F>(&fake, other_node, NODE_PORT), Decision::LEAVE);
    }

    fn rule_21_other_ports_of_a_service_address_are_left_alone<F: Names>() {
        let fake = tables::<F>();
        for (addr, port) in
            [(F::vip(1), 81), (own::<F>(), 22), (loopbacks::<F>()[0], 22), (F::vip(1), NODE_PORT)]
        {
            assert_eq!(host_to::<F>(&fake, addr, port), Decision::LEAVE, "{addr}:{port}");
        }
        let udp = Peer { proto: Proto::UDP, ..tcp(F::vip(1), 80) };
        assert_eq!(host(&fake, &udp, unspecified::<F>(), None, 0), Decision::LEAVE);
    }

    fn rule_22_ranges_admit_the_host_by_its_own_address<F: Names>() {
        let mut fake = tables::<F>();
        let balancer = fake.service(F::vip(6), 80, Proto::TCP, &[(F::pod(1), 8080)]);
        balancer.flags = Frontend::NORTH_SOUTH | Frontend::SOURCE_RANGES;
        let service = balancer.service;
        let denied = Decision::deny(DropReason::SourceRange);
        assert_eq!(host_to::<F>(&fake, F::vip(6), 80), denied);
        fake.ranges.push(ServiceClient { service, addr: own::<F>() });
        assert_eq!(backend(&fake, host_to::<F>(&fake, F::vip(6), 80)), F::pod(1));
        let bound = |addr| host(&fake, &tcp(F::vip(6), 80), addr, None, 0);
        assert_eq!(bound(F::vip(201)), denied, "it sends from another address");
        assert_eq!(backend(&fake, bound(own::<F>())), F::pod(1));
    }

    fn rule_28_the_loopback_serves_node_ports_to_the_host_only<F: Names>() {
        let fake = tables::<F>();
        for addr in loopbacks::<F>().into_iter().chain([unspecified::<F>()]) {
            assert_eq!(backend(&fake, host_to::<F>(&fake, addr, NODE_PORT)), F::pod(1), "{addr}");
            assert_eq!(pod_to(&fake, addr, NODE_PORT), Decision::LEAVE, "a pod's {addr} is its own");
        }
    }

    fn rule_28_what_is_bound_to_the_loopback_is_left_alone<F: Names>() {
        let fake = tables::<F>();
        for (addr, port) in [(F::vip(1), 80), (own::<F>(), NODE_PORT), (loopbacks::<F>()[0], NODE_PORT)] {
            assert_eq!(host(&fake, &tcp(addr, port), loopbacks::<F>()[1], None, 0), Decision::LEAVE);
        }
    }

    fn rule_29_all_processes_of_the_host_are_one_client<F: Names>() {
        let mut fake = tables::<F>();
        fake.clock.set(1_000);
        let frontend = fake.frontends.values_mut().find(|it| it.flags & Frontend::NORTH_SOUTH != 0).unwrap();
        frontend.affinity = 100;
        let service = frontend.service;
        let to = |addr, entropy| host(&fake, &tcp(addr, NODE_PORT), unspecified::<F>(), None, entropy);
        let first = backend(&fake, to(own::<F>(), 0));
        let other = backend(&fake, to(own::<F>(), u32::MAX));
        assert_eq!(first, other, "whatever its hash");
        assert_eq!(
            backend(&fake, to(loopbacks::<F>()[0], u32::MAX)),
            first,
            "at every address of the service"
        );
        let client = AffinityKey { client: own::<F>(), service };
        assert_eq!(fake.affinity.borrow()[&client].last_used, 1_000);
        fake.clock.set(1_101);
        assert_ne!(backend(&fake, to(own::<F>(), u32::MAX)), first, "for as long as the service says");
        assert_eq!(fake.affinity.borrow()[&client].last_used, 1_101);
    }

    fn rules_31_to_33_a_datagram_socket_moves_when_its_backend_stops_serving<F: Names>() {
        let mut fake = tables::<F>();
        let peer = tcp(F::vip(1), 80);
        let decide = |fake: &Fake, known| {
            let of_host = host(fake, &peer, unspecified::<F>(), known, u32::MAX);
            assert_eq!(pod(fake, &peer, known, u32::MAX), of_host);
            of_host
        };
        let first = translation(&fake, &peer, host_to::<F>(&fake, F::vip(1), 80).number).unwrap();
        assert_ne!(backend(&fake, decide(&fake, None)), first.backend, "the hash is of another backend");
        assert_eq!(backend(&fake, decide(&fake, Some(first))), first.backend, "a socket stays");
        fake.backends[first.index as usize].generation += 1;
        assert_ne!(backend(&fake, decide(&fake, Some(first))), first.backend);
        fake.frontends.clear();
        assert_eq!(decide(&fake, Some(first)), Decision::LEAVE, "the service is gone");
    }
}
