//! Ports of the host that lead to a pod of this node (`hostPort`, the capability `portMappings` of the CNI conventions).
//!
//! Each is a service with one backend of each family, the pod:
//!
//! | on | frontend | reached by |
//! | --- | --- | --- |
//! | every address | like a NodePort's, at every address of the host | clients outside, pods of any node, the host, which also has it on the loopback |
//! | one of the host's addresses | that address, as long as the host has it | the same, but on the loopback |
//! | a loopback address | that address, scope [`FrontendKey::OWN`] | the host's own processes |
//!
//! The pod sees the client: it is of this node, so replies come back through it. An address says more than none: a port at
//! one address goes before the same port, or a NodePort, at every address.

use std::slice;

use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey, ServiceName};
use ferroflow_common::addr::Addr;

use super::{Desired, PlanError, Planned, PlannedFrontend, PortRows};
use crate::model::{At, Condition, Family, HostPort, HostPorts, Name, World};

const FLAGS: u32 = Frontend::HOST_PORT | Frontend::NORTH_SOUTH | Frontend::KEEP_CLIENT;

/// The rows of one attachment's ports.
///
/// # Errors
/// As for [`super::service`].
pub(super) fn rows<'a>(world: &World, name: &Name, ports: &'a HostPorts) -> Result<Desired<'a>, PlanError> {
    let row = |port: &'a HostPort| {
        let text = super::text(name, &port.name);
        let Some(bytes) = ServiceName::new(&text) else { return Err(PlanError::NameTooLong { text }) };
        let frontends: Vec<_> = keys(world, ports, port).map(frontend).collect();
        let serves = |addr: &&Addr| frontends.iter().any(|it| meets(it, addr));
        let backends = ports.addresses.iter().filter(serves).map(|addr| backend(*addr, port)).collect();
        Ok(PortRows {
            name: &port.name,
            text: bytes,
            proto: port.proto,
            frontends,
            affinity: 0,
            backends,
            sources: Vec::new(),
        })
    };
    ports.ports().iter().map(row).collect()
}

/// Whether one of the ports has this frontend.
pub(super) fn have(world: &World, ports: &HostPorts, key: &FrontendKey) -> bool {
    ports.ports().iter().flat_map(|port| keys(world, ports, port)).any(|own| own == *key)
}

fn meets(frontend: &PlannedFrontend, addr: &Addr) -> bool {
    Family::of(&frontend.key.addr) == Family::of(addr)
}

fn frontend(key: FrontendKey) -> PlannedFrontend {
    PlannedFrontend { key, flags: FLAGS }
}

fn backend(addr: Addr, port: &HostPort) -> Planned {
    let (condition, sets) = (Condition::Ready, Backend::CLUSTER);
    Planned { addr, port: port.container_port, condition, sets, weight: 1, node: 0 }
}

/// Where the port is, in the families that the pod has.
fn keys(world: &World, ports: &HostPorts, port: &HostPort) -> impl Iterator<Item = FrontendKey> {
    let (number, proto) = (port.port, port.proto);
    let every = [FrontendKey::NODE_V4, FrontendKey::NODE_V6];
    let (addresses, scope): (Vec<Addr>, u8) = match port.at {
        At::Every => (every.into(), FrontendKey::EXTERNAL),
        At::EveryOf(family) => {
            (every.into_iter().filter(|it| Family::of(it) == family).collect(), FrontendKey::EXTERNAL)
        }
        At::One(addr) if addr.is_loopback() => (vec![addr], FrontendKey::OWN),
        // Rule 25. What is for others is not to be had by a pod that names their address.
        At::One(addr) => {
            let here = world.local_addresses().contains_key(&addr);
            (slice::from_ref(&addr)[..usize::from(here)].into(), FrontendKey::EXTERNAL)
        }
    };
    let families: Vec<Family> = ports.addresses.iter().map(Family::of).collect();
    let served = addresses.into_iter().filter(move |addr| families.contains(&Family::of(addr)));
    served.map(move |addr| FrontendKey { addr, port: number, proto, scope })
}
