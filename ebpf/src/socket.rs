//! Services translated where a socket names its peer: the packets then go to the backend by themselves.
//!
//! A destination that is no service, or a service without usable endpoints, is left as it is: the packet path then
//! passes or refuses it, with the same answer on every kernel (a cgroup program cannot set an errno before 5.18).

use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey};
use ferroflow_common::abi::node::Settings;
use ferroflow_common::abi::socket::Translation;
use ferroflow_common::addr::{Addr, Port, Proto};

use crate::lb::{self, Choice};
use crate::tables::Services;

/// Where a socket wants to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub addr: Addr,
    pub port: Port,
    pub proto: Proto,
}

/// The backend for a new connection; `entropy` stands in for the flow's hash, since the source port is not known yet.
#[inline(always)]
pub fn connect<T: Services>(tables: &T, peer: &Peer, entropy: u32) -> Option<Translation> {
    let Peer { addr, port, proto } = *peer;
    let mut key = FrontendKey { addr, port, proto, scope: FrontendKey::EXTERNAL };
    let frontend = tables.frontend(&key)?;
    // Affinity and source ranges go by the client's address, which a socket need not have yet; and nobody could tell
    // when a connection that is translated here ends.
    let by_packet = Frontend::SOURCE_RANGES | Frontend::LEAST_CONNECTION;
    if frontend.affinity != 0 || frontend.flags & by_packet != 0 {
        return None;
    }
    // A socket cannot stand in for its client (rule 26 e).
    if tables.settings() & Settings::MASQUERADE_ALL != 0 {
        return None;
    }
    let frontend = lb::internal(tables, frontend, &mut key);
    let Ok(Choice::Backend { index, backend }) = lb::choose(tables, &frontend, entropy) else { return None };
    Some(Translation {
        frontend: peer.addr,
        backend: backend.addr,
        frontend_port: peer.port,
        backend_port: backend.port,
        index,
        generation: backend.generation,
    })
}

/// What an unconnected datagram socket does with one more datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datagram {
    /// Send it where the last one to this service went.
    Same(Translation),
    /// Send it there and remember it.
    New(Translation),
    /// Not for us; where it is a second service on the same socket, the packet path serves it.
    Leave,
}

/// A socket remembers one service, so an answer can be shown as coming from it; the choice holds until the backend
/// stops serving (rule 31).
#[inline(always)]
pub fn sendmsg<T: Services>(
    tables: &T,
    peer: &Peer,
    remembered: Option<Translation>,
    entropy: u32,
) -> Datagram {
    if let Some(known) = remembered {
        if known.frontend != peer.addr || known.frontend_port != peer.port {
            return Datagram::Leave;
        }
        let serves = tables
            .backend(known.index)
            .is_some_and(|backend: Backend| backend.generation == known.generation);
        if serves {
            return Datagram::Same(known);
        }
    }
    match connect(tables, peer, entropy) {
        Some(translation) => Datagram::New(translation),
        None => Datagram::Leave,
    }
}

/// Who the application shall see as its peer: the service, where the socket's traffic is with the backend.
#[inline(always)]
pub fn seen(remembered: &Translation, addr: Addr, port: Port) -> Option<(Addr, Port)> {
    (remembered.backend == addr && remembered.backend_port == port)
        .then_some((remembered.frontend, remembered.frontend_port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::fake::Fake;

    const VIP: Addr = Addr::v4([10, 96, 0, 10]);
    const POD: Addr = Addr::v4([10, 244, 1, 2]);
    const DNS: Peer = Peer { addr: VIP, port: Port::new(53), proto: Proto::UDP };

    fn dns() -> Fake {
        let mut fake = Fake::default();
        fake.service(VIP, 53, Proto::UDP, &[(POD, 5353), (Addr::v4([10, 244, 2, 2]), 5353)]);
        fake
    }

    #[test]
    fn a_service_becomes_its_backend_and_is_seen_as_itself() {
        let translation = connect(&dns(), &DNS, 0).unwrap();
        assert_eq!((translation.backend, translation.backend_port), (POD, Port::new(5353)));
        assert_eq!(seen(&translation, POD, Port::new(5353)), Some((VIP, Port::new(53))));
        assert_eq!(seen(&translation, POD, Port::new(53)), None, "another port of the pod is itself");
    }

    #[test]
    fn no_service_and_no_endpoints_are_left_to_the_packet_path() {
        let mut fake = dns();
        assert_eq!(connect(&fake, &Peer { addr: POD, ..DNS }, 0), None);
        fake.service(VIP, 80, Proto::TCP, &[]);
        assert_eq!(connect(&fake, &Peer { port: Port::new(80), proto: Proto::TCP, ..DNS }, 0), None);
    }

    #[test]
    fn rule_31_a_datagram_socket_moves_when_its_backend_stops_serving() {
        let mut fake = dns();
        let Datagram::New(first) = sendmsg(&fake, &DNS, None, 0) else { panic!("not translated") };
        assert_eq!(sendmsg(&fake, &DNS, Some(first), u32::MAX), Datagram::Same(first));
        fake.backends[first.index as usize].generation += 1;
        let Datagram::New(second) = sendmsg(&fake, &DNS, Some(first), u32::MAX) else {
            panic!("stayed on a backend that is gone")
        };
        assert_ne!(second.backend, first.backend);
    }

    #[test]
    fn a_second_service_on_one_socket_is_left_to_the_packet_path() {
        let mut fake = dns();
        fake.service(VIP, 54, Proto::UDP, &[(POD, 5353)]);
        let Datagram::New(first) = sendmsg(&fake, &DNS, None, 0) else { panic!("not translated") };
        let other = Peer { port: Port::new(54), ..DNS };
        assert_eq!(sendmsg(&fake, &other, Some(first), 0), Datagram::Leave);
    }

    #[test]
    fn what_only_packets_can_tell_is_left_to_the_packet_path() {
        let mut fake = dns();
        let flags = |fake: &mut Fake, flags| fake.frontends.values_mut().for_each(|row| row.flags |= flags);
        flags(&mut fake, Frontend::LEAST_CONNECTION);
        assert_eq!(connect(&fake, &DNS, 0), None);
        let mut fake = dns();
        fake.settings = Some(Settings { flags: Settings::MASQUERADE_ALL, ..Settings::NONE });
        assert_eq!(connect(&fake, &DNS, 0), None, "rule 26 e");
    }
}
