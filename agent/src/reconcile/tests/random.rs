//! Random lives of a cluster, with failing writes and restarts, against a naive model.

use super::*;
use crate::maps::SourceRanges;
use crate::model::{Exposure, Family, NodeHint};

/// A small generator, so that a failure repeats.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// The cluster as plain lists.
#[derive(Default)]
struct Naive {
    services: BTreeMap<usize, NaiveService>,
    slices: BTreeMap<usize, NaiveSlice>,
    zone: Option<&'static str>,
}

struct NaiveService {
    ips: Vec<Addr>,
    balancers: Vec<Addr>,
    ports: Vec<NaivePort>,
    internal: TrafficPolicy,
    external: TrafficPolicy,
    affinity: u32,
    created: Option<i64>,
    ranges: Vec<Prefix>,
}

#[derive(Clone, Copy)]
struct NaivePort {
    name: &'static str,
    proto: Proto,
    port: u16,
    node_port: u16,
}

struct NaiveSlice {
    service: usize,
    ports: Vec<NaivePort>,
    endpoints: Vec<NaiveEndpoint>,
}

#[derive(Clone, Copy)]
struct NaiveEndpoint {
    addr: Addr,
    condition: Condition,
    place: Place,
    node: NodeHint,
    /// One letter a zone.
    zones: &'static str,
}

/// When the service was made, its number, which of its ports, and whether it is a cluster IP.
type Claim = (i64, usize, usize, bool);

const NAMES: [&str; 3] = ["a", "b", "c"];
const PROTOS: [Proto; 2] = [Proto::TCP, Proto::UDP];
const CONDITIONS: [Condition; 4] =
    [Condition::Ready, Condition::Draining, Condition::Serving, Condition::Down];
const POLICIES: [TrafficPolicy; 2] = [TrafficPolicy::Cluster, TrafficPolicy::Local];
const ZONES: [&str; 4] = ["", "x", "xy", "y"];
const NODES: [NodeHint; 3] = [NodeHint::Unsaid, NodeHint::ThisNode, NodeHint::Others];

impl Naive {
    fn change(&mut self, dice: &mut Dice) -> Change {
        match dice.below(20) {
            0 => {
                self.zone = [None, Some("x"), Some("y")][dice.below(3)];
                let node = Node { zone: self.zone.map(Into::into), ..Node::default() };
                Change::Node("here".into(), Some(node))
            }
            1..8 => self.change_service(dice),
            _ => self.change_slice(dice),
        }
    }

    fn change_service(&mut self, dice: &mut Dice) -> Change {
        let number = dice.below(5);
        let name = name(&format!("s{number}"));
        if dice.chance(30) {
            self.services.remove(&number);
            return Change::Service(name, None);
        }
        let (v4, v6) = (addr(&format!("10.96.0.{number}")), addr(&format!("fd00::{number}")));
        let mut ports: Vec<NaivePort> = Vec::new();
        for name in &NAMES[..1 + dice.below(3)] {
            let (proto, port) = (PROTOS[dice.below(2)], 80 + dice.below(2) as u16);
            let node_port = if dice.chance(40) { 30_000 + dice.below(3) as u16 } else { 0 };
            let twice = |it: &NaivePort| {
                it.proto == proto && (it.port == port || node_port != 0 && it.node_port == node_port)
            };
            if !ports.iter().any(twice) {
                ports.push(NaivePort { name, proto, port, node_port });
            }
        }
        let balancers = ["192.0.2.1", "192.0.2.2", "2001:db8::1"];
        let service = NaiveService {
            ips: [vec![v4], vec![v6], vec![v4, v6]][dice.below(3)].clone(),
            balancers: balancers.iter().filter(|_| dice.chance(25)).map(|text| addr(text)).collect(),
            ports,
            internal: POLICIES[dice.below(2)],
            external: POLICIES[dice.below(2)],
            affinity: [0, 0, 10][dice.below(3)],
            created: [None, Some(1), Some(2)][dice.below(3)],
            ranges: (0..dice.below(3))
                .filter_map(|_| Prefix::new(Addr::v4([dice.below(4) as u8, 0, 0, 0]), 8))
                .collect(),
        };
        let object = service.object();
        self.services.insert(number, service);
        Change::Service(name, Some(object))
    }

    fn change_slice(&mut self, dice: &mut Dice) -> Change {
        let number = dice.below(10);
        let name = name(&format!("e{number}"));
        if dice.chance(20) {
            self.slices.remove(&number);
            return Change::EndpointSlice(name, None);
        }
        let mut ports = Vec::new();
        for name in NAMES {
            if dice.below(3) > 0 {
                let (proto, port) = (PROTOS[dice.below(2)], 8080 + dice.below(2) as u16);
                ports.push(NaivePort { name, proto, port, node_port: 0 });
            }
        }
        // Most slices hint at all of their endpoints or at none.
        let (hints, all) = (dice.chance(50), dice.chance(80));
        let service = dice.below(5);
        let endpoints = (0..dice.below(5)).map(|_| {
            let last = dice.below(4) as u8;
            let hinted = if all { hints } else { dice.chance(50) };
            NaiveEndpoint {
                addr: if dice.chance(60) { Addr::v4([10, 0, 0, last]) } else { Addr::v6([last + 1; 16]) },
                condition: CONDITIONS[dice.below(4)],
                place: [Place::Remote, Place::Local][dice.below(2)],
                node: if hinted { NODES[dice.below(3)] } else { NodeHint::Unsaid },
                zones: if hinted { ZONES[1 + dice.below(3)] } else { "" },
            }
        });
        let slice = NaiveSlice { service, ports, endpoints: endpoints.collect() };
        let object = slice.object();
        self.slices.insert(number, slice);
        Change::EndpointSlice(name, Some(object))
    }

    /// The endpoints of a service port in one family, each once and as the best of its copies.
    fn endpoints(
        &self,
        service: usize,
        port: NaivePort,
        family: Family,
    ) -> BTreeMap<(Addr, u16), NaiveEndpoint> {
        let mut found: BTreeMap<(Addr, u16), NaiveEndpoint> = BTreeMap::new();
        let worth = |it: &NaiveEndpoint| (it.condition, it.node, it.zones);
        for slice in self.slices.values().filter(|slice| slice.service == service) {
            for number in slice.ports.iter().filter(|it| (it.name, it.proto) == (port.name, port.proto)) {
                for it in slice.endpoints.iter().filter(|it| Family::of(&it.addr) == family) {
                    let best = found.entry((it.addr, number.port)).or_insert(*it);
                    let place = best.place.max(it.place);
                    if worth(it) > worth(best) {
                        *best = *it;
                    }
                    best.place = place;
                }
            }
        }
        found
    }

    fn chosen(&self, service: usize, port: NaivePort, family: Family, policy: TrafficPolicy) -> String {
        let all = self.endpoints(service, port, family);
        let here = |it: &NaiveEndpoint| policy == TrafficPolicy::Cluster || it.place == Place::Local;
        let of = |condition| {
            let all = all.iter().filter(|(_, it)| it.condition == condition && here(it));
            all.collect::<Vec<_>>()
        };
        let mut chosen = of(Condition::Ready);
        if chosen.is_empty() {
            chosen = of(Condition::Draining);
        } else if policy == TrafficPolicy::Cluster {
            let nodes: Vec<_> = chosen.iter().map(|(_, it)| it.node).collect();
            let zone = self.zone.unwrap_or("no zone");
            if !nodes.contains(&NodeHint::Unsaid) && nodes.contains(&NodeHint::ThisNode) {
                chosen.retain(|(_, it)| it.node == NodeHint::ThisNode);
            } else if chosen.iter().all(|(_, it)| !it.zones.is_empty())
                && chosen.iter().any(|(_, it)| it.zones.contains(zone))
            {
                chosen.retain(|(_, it)| it.zones.contains(zone));
            }
        }
        if !all.values().any(|it| matches!(it.condition, Condition::Ready | Condition::Draining)) {
            return "reject".into();
        }
        let texts: BTreeSet<_> = chosen.iter().map(|((addr, port), _)| format!("{addr}:{port}")).collect();
        texts.into_iter().collect::<Vec<_>>().join(" ")
    }

    /// Who wants a frontend, the first one first.
    fn claims(&self) -> BTreeMap<(Addr, u16, Proto), BTreeSet<Claim>> {
        let mut claims: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for (&number, service) in &self.services {
            let families: Vec<_> = service.ips.iter().map(|ip| ip.ip().is_ipv4()).collect();
            let rank = service.created.unwrap_or(i64::MAX);
            for (index, port) in service.ports.iter().enumerate() {
                let node = [Addr::v4([0; 4]), Addr::v6([0; 16])].map(|addr| (addr, port.node_port, false));
                let own = service.ips.iter().map(|ip| (*ip, port.port, true));
                let balancers = service.balancers.iter().map(|ip| (*ip, port.port, false));
                let all = node.into_iter().filter(|it| it.1 != 0).chain(own).chain(balancers);
                for (addr, number_of, inside) in all.filter(|it| families.contains(&it.0.ip().is_ipv4())) {
                    let claim = claims.entry((addr, number_of, port.proto)).or_default();
                    claim.insert((rank, number, index, inside));
                }
            }
        }
        claims
    }

    fn view(&self) -> BTreeMap<String, String> {
        let mut view = BTreeMap::new();
        for ((addr, number, proto), claims) in self.claims() {
            let &(_, service, index, inside) = claims.first().unwrap();
            let (object, family) = (&self.services[&service], Family::of(&addr));
            let port = object.ports[index];
            let policy = if inside { object.internal } else { object.external };
            let key = format!("{addr}:{number}/{proto}");
            if !inside && policy == TrafficPolicy::Local {
                let text = self.chosen(service, port, family, TrafficPolicy::Cluster);
                view.insert(format!("{key} internal"), text);
            }
            view.insert(key, self.chosen(service, port, family, policy));
        }
        view
    }

    fn cluster_ips(&self) -> BTreeSet<Addr> {
        self.services.values().flat_map(|it| it.ips.clone()).collect()
    }

    /// Services that another one goes before somewhere.
    fn losers(&self) -> BTreeSet<String> {
        let claims = self.claims();
        claims
            .values()
            .flat_map(|it| it.iter().skip(1))
            .map(|it| format!("Service default/s{}", it.1))
            .collect()
    }

    fn live(&self) -> BTreeSet<String> {
        let mut live = BTreeSet::new();
        for (&service, object) in &self.services {
            for ip in &object.ips {
                for &port in &object.ports {
                    for ((addr, number), it) in self.endpoints(service, port, Family::of(ip)) {
                        if it.condition != Condition::Down {
                            let NaivePort { name, proto, .. } = port;
                            live.insert(format!("default/s{service}:{name} {addr}:{number}/{proto}"));
                        }
                    }
                }
            }
        }
        live
    }
}

impl NaiveService {
    fn object(&self) -> Service {
        let ports = self.ports.iter().map(|it| ServicePort {
            name: it.name.into(),
            proto: it.proto,
            port: Port::new(it.port),
            node_port: Some(Port::new(it.node_port)).filter(|port| *port != Port::ZERO),
        });
        let exposure = Exposure {
            policy: self.external,
            load_balancer_ips: self.balancers.clone().into(),
            source_ranges: self.ranges.clone().into(),
            ..Exposure::default()
        };
        Service {
            cluster_ips: self.ips.clone().into(),
            ports: ports.collect(),
            internal_policy: self.internal,
            affinity: self.affinity,
            created: self.created,
            exposure,
            ..Service::default()
        }
    }
}

impl NaiveSlice {
    fn object(&self) -> EndpointSlice {
        let ports = self.ports.iter().map(|it| SlicePort {
            name: it.name.into(),
            proto: it.proto,
            port: Port::new(it.port),
        });
        let endpoints = self.endpoints.iter().map(|it| Endpoint {
            node_hint: it.node,
            zone_hint: ZONES.iter().position(|zones| *zones == it.zones).unwrap() as u16,
            ..Endpoint::new(it.addr, it.condition, it.place)
        });
        let zones = ZONES[1..].iter().map(|zones| zones.chars().map(|it| it.to_string().into()).collect());
        EndpointSlice {
            service: format!("s{}", self.service).into(),
            ports: ports.collect(),
            endpoints: endpoints.collect(),
            zones: zones.collect(),
        }
    }
}

/// Until nothing is written although everything that fails was tried again.
fn settle(run: &mut Run) {
    loop {
        let before = run.stats();
        for _ in 0..500 {
            let Some(due) = run.it.due().filter(|due| *due <= run.now + Duration::from_secs(1)) else {
                break;
            };
            run.now = run.now.max(due);
            run.it.tick(run.now);
        }
        if run.errors().iter().all(|error| error.contains("belongs to Service"))
            && before.writes == run.stats().writes
        {
            return;
        }
        run.now += Duration::from_secs(31);
    }
}

#[test]
fn random_lives_agree_with_a_naive_model() {
    let mut conflicts = 0;
    for seed in 0..40 {
        let mut dice = Dice(seed);
        let mut naive = Naive::default();
        let mut run = Run::new();
        let mut last = BTreeMap::new();
        for step in 0..60 {
            run.it.maps_mut().set_faults(match dice.below(3) {
                0 => Faults::Percent { seed: dice.below(1000) as u64, percent: dice.below(50) as u64 },
                _ => Faults::Never,
            });
            for _ in 0..1 + dice.below(4) {
                let change = naive.change(&mut dice);
                last.insert(key(&change), change.clone());
                run.handle(&[change]);
            }
            if dice.chance(10) {
                // The agent dies with what it has not written yet, maybe in the middle of it.
                run.it.maps_mut().set_faults(Faults::After { writes: dice.below(20) as u64 });
                run.it.tick(run.now);
                let mut maps = run.it.maps().clone();
                maps.set_faults(Faults::Never);
                run = Run::restart(maps);
                run.handle(&last.values().cloned().collect::<Vec<_>>()).it.synced();
            }
            settle(&mut run);
            run.now += Duration::from_secs(dice.below(8) as u64);
            let failing: BTreeSet<_> = run.it.failing().map(|(key, _)| key.to_string()).collect();
            assert_eq!(failing, naive.losers(), "seed {seed}, step {step}");
            assert_eq!(run.view(), naive.view(), "seed {seed}, step {step}");
            assert_eq!(cluster_ips(&run), naive.cluster_ips(), "rule 19, seed {seed}, step {step}");
            assert_eq!(live(run.it.maps()), naive.live(), "seed {seed}, step {step}");
            assert_eq!(run.stats().backends, naive.live().len(), "seed {seed}, step {step}: no index leaks");
            conflicts += failing.len();
        }
        let gone: Vec<_> = (0..5).map(|number| gone(&format!("s{number}"))).collect();
        run.it.maps_mut().set_faults(Faults::Never);
        run.apply(&gone);
        let Stats { services, frontends, backends, slots, .. } = run.stats();
        assert_eq!((services, frontends, backends, slots), (0, 0, 0, 0), "seed {seed}: nothing leaks");
        assert_eq!(run.it.maps().dump::<SourceRanges>().unwrap(), [], "seed {seed}");
    }
    assert!(conflicts > 100, "{conflicts}");
}

fn cluster_ips(run: &Run) -> BTreeSet<Addr> {
    let rows = run.it.maps().dump::<Frontends>().unwrap();
    rows.into_iter().filter(|(key, _)| key.is_cluster_ip()).map(|(key, _)| key.addr).collect()
}

fn key(change: &Change) -> String {
    match change {
        Change::Service(name, _) => format!("s {name}"),
        Change::EndpointSlice(name, _) => format!("e {name}"),
        Change::Node(name, _) => format!("n {name}"),
        Change::Pod(..)
        | Change::ServiceCidr(..)
        | Change::KubeProxy(..)
        | Change::Attachment(..)
        | Change::Tenant(..)
        | Change::Namespace(..)
        | Change::NetworkPolicy(..)
        | Change::ClusterNetworkPolicy(..)
        | Change::LocalRoute(..)
        | Change::LocalAddress(..)
        | Change::LocalSubnet(..)
        | Change::HostPorts(..)
        | Change::Queue { .. }
        | Change::Uplink { .. }
        | Change::Tunnel(_) => unreachable!("not generated"),
    }
}
