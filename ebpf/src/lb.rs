//! Which service a destination is, and which backend a flow gets.

use ferroflow_common::abi::conntrack::Tuple;
use ferroflow_common::abi::lb::{Affinity, AffinityKey, Backend, Frontend, FrontendKey};
use ferroflow_common::abi::node::NodeAddress;
use ferroflow_common::addr::Addr;
use ferroflow_common::family::Family;
use ferroflow_common::hash;
use ferroflow_common::verdict::DropReason;

use crate::tables::Services;

/// What a frontend answers a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Backend {
        index: u32,
        backend: Backend,
    },
    /// No endpoint anywhere: refuse at once (rule 14).
    Reject,
}

/// What a packet with this destination looks up: one hash lookup says whether that is a service at all. The key is
/// changed in place where another row is looked up, because the programs' stack is short.
#[inline(always)]
pub fn key<F: Family>(tuple: &Tuple<F::Bytes>) -> FrontendKey {
    let scope = FrontendKey::EXTERNAL;
    FrontendKey { addr: F::addr(tuple.dst), port: tuple.dst_port, proto: tuple.proto, scope }
}

/// Whether this is a row at all. Every service has an id from 1 on: looking at it keeps the compiler from computing
/// with the row's address instead, which the verifier refuses.
#[inline(always)]
pub fn is_service(row: Option<Frontend>) -> bool {
    row.is_some_and(|frontend| frontend.service != 0)
}

/// The NodePort that a packet to one of this node's own addresses is for (rules 17, 24, 25), or the port of the host, which
/// is at all of them; the key is then its.
#[inline(always)]
pub fn node_port<T: Services>(tables: &T, key: &mut FrontendKey) -> Option<Frontend> {
    let address = tables.node_address(&key.addr)?;
    let frontend = node_row(tables, key)?;
    let serves = address.flags & NodeAddress::NODE_PORTS != 0 || frontend.flags & Frontend::HOST_PORT != 0;
    serves.then_some(frontend)
}

/// The NodePort on an address that is known to serve them; the key is then its.
#[inline(always)]
pub fn node_row<T: Services>(tables: &T, key: &mut FrontendKey) -> Option<Frontend> {
    key.addr = if key.addr.is_v4() { FrontendKey::NODE_V4 } else { FrontendKey::NODE_V6 };
    tables.frontend(key)
}

/// The row for traffic from this node's own pods and host (rule 16), given the one for traffic from anywhere.
#[inline(always)]
pub fn internal<T: Services>(tables: &T, external: Frontend, key: &mut FrontendKey) -> Frontend {
    if external.flags & Frontend::INTERNAL_ROW == 0 {
        return external;
    }
    key.scope = FrontendKey::INTERNAL;
    tables.frontend(key).unwrap_or(external)
}

/// The backend that a client has kept, where the service has affinity and it may still be used (rule 29).
#[inline(always)]
pub fn kept<T: Services>(tables: &T, frontend: &Frontend, client: Addr, now: u32) -> Option<u32> {
    if frontend.affinity == 0 || frontend.length == 0 {
        return None;
    }
    let kept = tables.remembered(&AffinityKey { client, service: frontend.service })?;
    let backend = tables.backend(kept.backend)?;
    let fresh = now <= kept.last_used.saturating_add(frontend.affinity);
    (fresh && backend.generation == kept.generation && frontend.chooses(&backend)).then_some(kept.backend)
}

/// Keeps the client at its backend for as long as the service says from now on.
#[inline(always)]
pub fn keep<T: Services>(tables: &T, frontend: &Frontend, client: Addr, index: u32, now: u32) {
    if frontend.affinity == 0 {
        return;
    }
    if let Some(Backend { generation, .. }) = tables.backend(index) {
        let choice = Affinity { backend: index, generation, last_used: now };
        tables.remember(&AffinityKey { client, service: frontend.service }, &choice);
    }
}

/// The backend of a client's new flow: the one that it has kept, or else the one that its hash chooses; `None` where
/// the frontend rejects (rule 14).
///
/// # Errors
/// As for [`choose`].
#[inline(always)]
pub fn kept_or_chosen<T: Services>(
    tables: &T,
    frontend: &Frontend,
    client: Addr,
    now: u32,
    hash: impl FnOnce() -> u32,
) -> Result<Option<u32>, DropReason> {
    let index = match kept(tables, frontend, client, now) {
        Some(index) => index,
        None => match choose(tables, frontend, hash())? {
            Choice::Backend { index, .. } => index,
            Choice::Reject => return Ok(None),
        },
    };
    keep(tables, frontend, client, index, now);
    Ok(Some(index))
}

/// The backend that `hash` chooses among the frontend's slots.
///
/// # Errors
/// [`DropReason::NoLocalEndpoint`] where the frontend has no slots and must not reject (rule 15),
/// [`DropReason::NoBackend`] where a slot names no live backend.
#[inline(always)]
pub fn choose<T: Services>(tables: &T, frontend: &Frontend, hash: u32) -> Result<Choice, DropReason> {
    if frontend.length == 0 {
        return if frontend.flags & Frontend::REJECT != 0 {
            Ok(Choice::Reject)
        } else {
            Err(DropReason::NoLocalEndpoint)
        };
    }
    let at = |hash| frontend.offset.wrapping_add(hash::slot(hash, frontend.length));
    let mut index = tables.slot(at(hash)).ok_or(DropReason::NoBackend)?;
    if frontend.flags & Frontend::LEAST_CONNECTION != 0 {
        let other = tables.slot(at(second(hash))).ok_or(DropReason::NoBackend)?;
        if tables.connections(other) < tables.connections(index) {
            index = other;
        }
    }
    let backend = tables.backend(index).ok_or(DropReason::NoBackend)?;
    if backend.flags & Backend::LIVE == 0 {
        return Err(DropReason::NoBackend);
    }
    Ok(Choice::Backend { index, backend })
}

/// The hash of a flow's second choice: "the power of two choices" keeps the fullest backend close to the others
/// (Mitzenmacher, IEEE TPDS 2001), where the first alone, or the emptiest of all, would not.
#[inline(always)]
const fn second(hash: u32) -> u32 {
    hash::finish(hash::mix(SECOND, hash as u64))
}

const SECOND: u64 = 2;

/// A flow's hash: equal for every packet of the flow, on every node, so two CPUs that see the first packets of one
/// flow choose the same backend.
#[inline(always)]
pub fn flow_hash<F: Family>(tuple: &Tuple<F::Bytes>) -> u32 {
    let [s0, s1, s2, s3] = F::words(&tuple.src);
    let [d0, d1, d2, d3] = F::words(&tuple.dst);
    let pair = |high: u32, low: u32| (u64::from(high) << 32) | u64::from(low);
    let ports = u32::from_ne_bytes([
        tuple.src_port.be[0],
        tuple.src_port.be[1],
        tuple.dst_port.be[0],
        tuple.dst_port.be[1],
    ]);
    let mut state = hash::mix(u64::from(tuple.proto.number), pair(s0, d0));
    if F::CSUM_OFF.is_none() {
        state = hash::mix(state, pair(s1, d1));
        state = hash::mix(state, pair(s2, d2));
        state = hash::mix(state, pair(s3, d3));
    }
    hash::finish(hash::mix(state, u64::from(ports)))
}

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::{Port, Proto};

    use std::collections::BTreeMap;

    use super::*;
    use crate::noise::Noise;
    use crate::tables::fake::Fake;

    const VIP: Addr = Addr::v4([10, 96, 0, 10]);
    const PODS: [(Addr, u16); 3] = [
        (Addr::v4([10, 244, 1, 2]), 8080),
        (Addr::v4([10, 244, 1, 3]), 8080),
        (Addr::v4([10, 244, 2, 2]), 8080),
    ];

    fn web() -> FrontendKey {
        FrontendKey { addr: VIP, port: Port::new(80), proto: Proto::TCP, scope: FrontendKey::EXTERNAL }
    }

    fn lookup(fake: &Fake) -> Frontend {
        fake.frontend(&web()).unwrap()
    }

    #[test]
    fn every_backend_gets_its_share() {
        let mut fake = Fake::default();
        fake.service(VIP, 80, Proto::TCP, &PODS);
        let mut counts = [0; 3];
        for i in 0..3000u64 {
            let hash = hash::finish(hash::mix(1, i));
            let Ok(Choice::Backend { index, backend }) = choose(&fake, &lookup(&fake), hash) else {
                panic!("no backend for {i}")
            };
            assert_eq!(backend.addr, PODS[index as usize - 1].0);
            counts[index as usize - 1] += 1;
        }
        assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
    }

    /// Connections of very different lengths: by chance alone the fullest of ten backends has many more than its share.
    #[test]
    fn least_connection_evens_out_connections_of_unequal_lengths() {
        let pods: Vec<_> = (0..10).map(|last| (Addr::v4([10, 244, 3, last]), 8080)).collect();
        let spread = |flags| {
            let mut fake = Fake::default();
            fake.service(VIP, 80, Proto::TCP, &pods).flags |= flags;
            let frontend = lookup(&fake);
            let (mut ends, mut noise) = (BTreeMap::<u64, Vec<u32>>::new(), Noise(7));
            let mut worst = 0;
            for now in 0..30_000u64 {
                // The sweep: what has closed is taken off, at intervals.
                if now % 100 == 0 {
                    let open = ends.split_off(&now);
                    ends = open;
                    let mut truth = fake.connections.borrow_mut();
                    truth.clear();
                    ends.values().flatten().for_each(|index| *truth.entry(*index).or_insert(0) += 1);
                }
                let Ok(Choice::Backend { index, .. }) = choose(&fake, &frontend, noise.number() as u32)
                else {
                    panic!("no backend")
                };
                fake.connect(index);
                let length = if noise.percent(2) { 20_000 } else { 50 };
                ends.entry(now + length).or_default().push(index);
                if now > 25_000 && now % 100 == 0 {
                    let counts = fake.connections.borrow();
                    let all: Vec<_> =
                        (1..=10).map(|index| counts.get(&index).copied().unwrap_or(0)).collect();
                    worst = worst.max(all.iter().max().unwrap() - all.iter().min().unwrap());
                }
            }
            worst
        };
        let (random, least) = (spread(0), spread(Frontend::LEAST_CONNECTION));
        // 45 each, of which 40 are long ones: by chance they differ by a few times the root of that. Between two sweeps
        // the counts do not tell a long one from one that has closed, so that they do not become equal either.
        assert!(random >= 2 * least, "fullest less emptiest: {least}, by chance {random}");
    }

    #[test]
    fn least_connection_takes_the_emptier_of_two_slots_and_every_backend_has_its_turn() {
        let mut fake = Fake::default();
        fake.service(VIP, 80, Proto::TCP, &PODS).flags |= Frontend::LEAST_CONNECTION;
        let frontend = lookup(&fake);
        let of = |fake: &Fake| {
            let mut counts = [0; 3];
            for i in 0..3000u64 {
                let Ok(Choice::Backend { index, .. }) =
                    choose(fake, &frontend, hash::finish(hash::mix(1, i)))
                else {
                    panic!("no backend")
                };
                counts[index as usize - 1] += 1;
            }
            counts
        };
        assert!(of(&fake).iter().all(|count| (900..1100).contains(count)), "equal: {:?}", of(&fake));
        fake.connections.borrow_mut().extend([(1, 5), (2, 6), (3, 7)]);
        // The fullest only where both choices fall on it: 1 in 9; the emptiest wherever it is one of them: 5 in 9.
        let [emptiest, _, fullest] = of(&fake);
        assert!((1567..1767).contains(&emptiest) && (283..383).contains(&fullest), "{:?}", of(&fake));
    }

    #[test]
    fn a_frontend_is_told_by_address_port_and_protocol() {
        let mut fake = Fake::default();
        fake.service(VIP, 80, Proto::TCP, &PODS);
        assert!(fake.frontend(&FrontendKey { proto: Proto::UDP, ..web() }).is_none());
        assert!(fake.frontend(&FrontendKey { port: Port::new(81), ..web() }).is_none());
        assert!(fake.frontend(&FrontendKey { addr: PODS[0].0, ..web() }).is_none());
    }

    #[test]
    fn rules_14_and_15_without_slots_a_frontend_rejects_or_drops() {
        let mut fake = Fake::default();
        fake.service(VIP, 80, Proto::TCP, &[]);
        let mut frontend = lookup(&fake);
        assert_eq!(choose(&fake, &frontend, 7), Ok(Choice::Reject));
        frontend.flags = 0;
        assert_eq!(choose(&fake, &frontend, 7), Err(DropReason::NoLocalEndpoint));
    }

    #[test]
    fn a_slot_that_names_nothing_live_drops() {
        let mut fake = Fake::default();
        fake.service(VIP, 80, Proto::TCP, &PODS);
        fake.slots.fill(0);
        assert_eq!(choose(&fake, &lookup(&fake), 7), Err(DropReason::NoBackend));
        fake.slots.clear();
        assert_eq!(choose(&fake, &lookup(&fake), 7), Err(DropReason::NoBackend));
    }

    #[test]
    fn rule_29_a_client_keeps_its_backend_while_it_may_be_used() {
        let mut fake = Fake::default();
        let frontend = fake.service(VIP, 80, Proto::TCP, &PODS);
        frontend.affinity = 100;
        let frontend = *frontend;
        for backend in &mut fake.backends {
            backend.flags |= Backend::CLUSTER;
        }
        let client = Addr::v4([10, 244, 1, 9]);
        let kept = |fake: &Fake, now| kept(fake, &frontend, client, now);
        assert_eq!(kept(&fake, 1_000), None, "a new client chooses");
        keep(&fake, &frontend, client, 2, 1_000);
        assert_eq!(kept(&fake, 1_100), Some(2));
        assert_eq!(kept(&fake, 1_101), None, "too long ago");
        keep(&fake, &frontend, client, 2, 1_090);
        assert_eq!(kept(&fake, 1_190), Some(2), "each use counts from then");
        assert_eq!(
            super::kept(&fake, &Frontend { affinity: 0, ..frontend }, client, 1_100),
            None,
            "turned off"
        );
        let local = Frontend { flags: Frontend::LOCAL, ..frontend };
        assert_eq!(super::kept(&fake, &local, client, 1_100), None, "not one of those it chooses among");
        fake.backends[2].generation += 1;
        assert_eq!(kept(&fake, 1_100), None, "gone");
    }

    #[test]
    fn rule_16_traffic_of_the_node_has_a_row_of_its_own() {
        let mut fake = Fake::default();
        let external = fake.service(VIP, 80, Proto::TCP, &[]);
        external.flags = Frontend::INTERNAL_ROW;
        let external = *external;
        assert_eq!(internal(&fake, external, &mut web()), external, "not written yet");
        let row = Frontend { length: 3, ..external };
        fake.frontends.insert(FrontendKey { scope: FrontendKey::INTERNAL, ..web() }, row);
        assert_eq!(internal(&fake, external, &mut web()), row);
        let alone = Frontend { flags: 0, ..external };
        assert_eq!(internal(&fake, alone, &mut web()), alone);
    }

    #[test]
    fn rules_17_and_24_a_node_port_is_on_the_nodes_chosen_addresses() {
        let mut fake = Fake::default();
        let (own, unchosen, other) =
            (Addr::v4([192, 168, 5, 1]), Addr::v4([192, 168, 6, 1]), Addr::v4([192, 168, 5, 2]));
        fake.node.insert(own, NodeAddress { flags: NodeAddress::NODE_PORTS });
        fake.node.insert(unchosen, NodeAddress { flags: 0 });
        let expected = *fake.service(FrontendKey::NODE_V4, 80, Proto::TCP, &PODS);
        let found = |addr| node_port(&fake, &mut FrontendKey { addr, ..web() });
        assert_eq!(found(own), Some(expected));
        assert_eq!((found(unchosen), found(other)), (None, None));
        fake.service(FrontendKey::NODE_V4, 80, Proto::TCP, &PODS).flags = Frontend::HOST_PORT;
        let found = |addr| node_port(&fake, &mut FrontendKey { addr, ..web() }).is_some();
        assert!(found(own) && found(unchosen) && !found(other), "a port of the host is at all its addresses");
    }
}
