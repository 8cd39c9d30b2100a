//! Which service a destination is, and which backend a flow gets.

use ferroflow_common::abi::conntrack::Tuple;
use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey};
use ferroflow_common::addr::{Addr, Port, Proto};
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

/// One hash lookup says whether this is a service at all.
#[inline(always)]
pub fn frontend<T: Services>(tables: &T, addr: Addr, port: Port, proto: Proto) -> Option<Frontend> {
    tables.frontend(&FrontendKey { addr, port, proto, scope: FrontendKey::EXTERNAL })
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
    let slot = frontend.offset.wrapping_add(hash::slot(hash, frontend.length));
    let index = tables.slot(slot).ok_or(DropReason::NoBackend)?;
    let backend = tables.backend(index).ok_or(DropReason::NoBackend)?;
    if backend.flags & Backend::LIVE == 0 {
        return Err(DropReason::NoBackend);
    }
    Ok(Choice::Backend { index, backend })
}

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
    use super::*;
    use crate::tables::fake::Fake;

    const VIP: Addr = Addr::v4([10, 96, 0, 10]);
    const PODS: [(Addr, u16); 3] = [
        (Addr::v4([10, 244, 1, 2]), 8080),
        (Addr::v4([10, 244, 1, 3]), 8080),
        (Addr::v4([10, 244, 2, 2]), 8080),
    ];

    fn lookup(fake: &Fake) -> Frontend {
        frontend(fake, VIP, Port::new(80), Proto::TCP).unwrap()
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

    #[test]
    fn a_frontend_is_told_by_address_port_and_protocol() {
        let mut fake = Fake::default();
        fake.service(VIP, 80, Proto::TCP, &PODS);
        assert!(frontend(&fake, VIP, Port::new(80), Proto::UDP).is_none());
        assert!(frontend(&fake, VIP, Port::new(81), Proto::TCP).is_none());
        assert!(frontend(&fake, PODS[0].0, Port::new(80), Proto::TCP).is_none());
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
}
