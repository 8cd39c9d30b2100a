//! Time per packet on each path.
//!
//! A measurement runs a program many times on one packet, and each run finds the packet as the one before left it. A
//! flow that is to be rewritten every time therefore goes back and forth between two services that have each other as
//! their backend. What is measured is the program alone: no driver, no routing and no delivery, and the tables are warm
//! in the CPU's cache.

use anyhow::{Result, ensure};
use ferroflow_common::{
    abi::{
        node::Settings,
        policy::{
            EndpointPolicy, PolicyKey, PortRange,
            Verdict::{Allow, Deny},
        },
    },
    addr::Proto,
    family::{V4, V6},
    tcp::Flags,
};
use ferroflow_ebpf::{
    frame::{Frame, Names, Socket},
    tables::fake::{Fake, Lookups},
};

use crate::run::{Program, Programs};

/// A packet that meets the same every time.
struct Route {
    name: String,
    program: Program,
    packet: Vec<u8>,
}

/// Measurements of each; the machine is not idle.
const RUNS: usize = 5;

pub(super) fn print(programs: &mut Programs, repeat: u32) -> Result<()> {
    println!(
        "{:<28} {:<12} {:>6} {:>9} {:>13} {:>12}",
        "PATH", "PROGRAM", "MIN ns", "MEDIAN ns", "HASH LOOKUPS", "ARRAY READS"
    );
    measure(programs, repeat, (tables()?, routes()))?;
    measure(programs, repeat, (guarded_tables()?, guarded_routes()))?;
    println!();
    Ok(())
}

fn measure(programs: &mut Programs, repeat: u32, (tables, routes): (Fake, Vec<Route>)) -> Result<()> {
    programs.fill(&tables)?;
    for Route { name, program, packet } in routes {
        programs.set_tracked(&tables.tracked())?;
        let mut times = Vec::new();
        for _ in 0..RUNS {
            times.push(programs.time(program, &packet, repeat)?.as_nanos());
        }
        times.sort_unstable();
        let Lookups { hash, array } = lookups(program, &packet, &tables);
        println!(
            "{name:<28} {:<12} {:>6} {:>9} {hash:>13} {array:>12}",
            program.name(),
            times[0],
            times[RUNS / 2]
        );
    }
    Ok(())
}

/// As the library makes them on the same packet.
fn lookups(program: Program, packet: &[u8], tables: &Fake) -> Lookups {
    tables.lookups.set(Lookups::default());
    let (_verdict, _bytes) = program.on_host(packet, tables);
    tables.lookups.get()
}

/// Where each family's packets come from and go to.
struct Ends {
    client: Socket,
    /// Two services, each the other's backend.
    pair: [Socket; 2],
    pod: Socket,
    far: Socket,
}

impl Ends {
    fn new<F: Names>(port: u16) -> Self {
        let pair = [(F::vip(1), port), (F::vip(2), port)];
        Self { client: (F::pod(1), 4000), pair, pod: (F::pod(2), port), far: (F::pod(3), port) }
    }
}

const PORTS: [(Proto, u16); 2] = [(Proto::TCP, 80), (Proto::UDP, 53)];

fn routes() -> Vec<Route> {
    let arp = [&[0xff; 12][..], &[8, 6], &[0; 28]].concat();
    let route = |name: &str, program, packet: Vec<u8>| Route { name: name.to_owned(), program, packet };
    let mut routes = vec![route("not IP", Program::PodEgress, arp)];
    for (family, ends) in [
        ("IPv4", PORTS.map(|(proto, port)| (proto, Ends::new::<V4>(port)))),
        ("IPv6", PORTS.map(|(proto, port)| (proto, Ends::new::<V6>(port)))),
    ] {
        for (proto, ends) in ends {
            let frame = |src, dst| segment(proto, src, dst, Flags::ACK).build();
            let name = |what: &str| format!("{family} {proto} {what}");
            if proto == Proto::TCP {
                let (local, remote) = (frame(ends.client, ends.pod), frame(ends.client, ends.far));
                let incoming = frame(ends.far, ends.client);
                routes.push(route(&name("to a local pod"), Program::PodEgress, local));
                routes.push(route(&name("to a remote pod"), Program::PodEgress, remote));
                routes.push(route(&name("from a remote pod"), Program::PodIngress, incoming));
            }
            let forward = frame(ends.client, ends.pair[0]);
            let reply = frame(ends.pair[0], ends.client);
            routes.push(route(&name("to a service"), Program::PodEgress, forward));
            routes.push(route(&name("reply, local"), Program::PodEgress, reply.clone()));
            routes.push(route(&name("reply, remote"), Program::PodIngress, reply));
        }
    }
    routes
}

/// The two services with established flows, and local pods.
fn tables() -> Result<Fake> {
    let mut tables = Fake::default();
    for (proto, port) in PORTS {
        for ends in [Ends::new::<V4>(port), Ends::new::<V6>(port)] {
            let [one, other] = ends.pair;
            tables.service(one.0, one.1, proto, &[other]);
            tables.service(other.0, other.1, proto, &[one]);
        }
    }
    for ends in [Ends::new::<V4>(0), Ends::new::<V6>(0)] {
        let local = [ends.client, ends.pod, ends.pair[0], ends.pair[1]];
        for (index, (addr, _port)) in (1..).zip(local) {
            tables.local(addr, index);
        }
    }
    tables.clock.set(Programs::now()?);
    // Both services' flows first: a reply entry is of the flow through the other service.
    for (proto, port) in PORTS {
        for ends in [Ends::new::<V4>(port), Ends::new::<V6>(port)] {
            let open = |service| segment(proto, ends.client, service, Flags::SYN).leave(&tables);
            ensure!(
                ends.pair.into_iter().all(|service| open(service).is_ok()),
                "a flow to measure is dropped"
            );
            for service in ends.pair {
                let answer = segment(proto, service, ends.client, Flags::SYN | Flags::ACK);
                let seen = answer.leave(&tables);
                ensure!(seen.is_ok_and(|(_, bytes)| bytes != answer.build()), "an answer is not rewritten");
            }
        }
    }
    Ok(tables)
}

/// Between pods that policies isolate both ways. A first packet that passes does so once; one that is refused, by the
/// receiver's policies after the sender's, asks no less.
fn guarded_routes() -> Vec<Route> {
    let mut routes = Vec::new();
    for (family, ends) in [("IPv4", Ends::new::<V4>(80)), ("IPv6", Ends::new::<V6>(80))] {
        let Ends { client, pod, far, .. } = ends;
        let frame = |src, dst, flags| segment(Proto::TCP, src, dst, flags).build();
        for (name, program, packet) in [
            ("to a local pod", Program::PodEgress, frame(client, pod, Flags::ACK)),
            ("to a remote pod", Program::PodEgress, frame(client, far, Flags::ACK)),
            ("from a remote pod", Program::PodIngress, frame(far, client, Flags::ACK)),
            ("refused", Program::PodEgress, frame(client, (pod.0, 81), Flags::SYN)),
        ] {
            routes.push(Route { name: format!("{family} guarded, {name}"), program, packet });
        }
    }
    routes
}

/// Their flows, and policies that mean each of them by its address.
fn guarded_tables() -> Result<Fake> {
    let mut tables = tables()?;
    tables.settings = Some(Settings { flags: Settings::POLICIES, ..Settings::NONE });
    let policy = EndpointPolicy { ingress: 1, egress: 2, adopts_until: 0, live: EndpointPolicy::FINISH };
    tables.endpoints.values_mut().for_each(|row| row.policy = policy);
    for ends in [Ends::new::<V4>(80), Ends::new::<V6>(80)] {
        tables.policies.classes.extend([ends.client, ends.pod, ends.far].map(|(addr, _)| (addr, 1)));
    }
    let verdict = Allow as u8;
    let web = PortRange { first: 80, last: 80, proto: Proto::TCP, verdict, cause: 0 };
    for (set, otherwise) in [(1, Deny), (2, Allow)] {
        tables.policies.lay(set, PolicyKey::OTHERS, Deny, &[]);
        tables.policies.lay(set, 1, otherwise, &[web]);
    }
    for ends in [Ends::new::<V4>(80), Ends::new::<V6>(80)] {
        for to in [ends.pod, ends.far] {
            let opened = segment(Proto::TCP, ends.client, to, Flags::SYN).leave(&tables);
            ensure!(opened.is_ok(), "a flow to measure is dropped");
            let answered = segment(Proto::TCP, to, ends.client, Flags::SYN | Flags::ACK).leave(&tables);
            ensure!(answered.is_ok(), "an answer is dropped");
        }
    }
    Ok(tables)
}

/// A packet of the protocol; a datagram has no flags.
fn segment(proto: Proto, src: Socket, dst: Socket, flags: u8) -> Frame {
    let frame = if proto == Proto::TCP { Frame::tcp(src, dst, flags) } else { Frame::udp(src, dst) };
    frame.payload(b"0123456789abcdef")
}
