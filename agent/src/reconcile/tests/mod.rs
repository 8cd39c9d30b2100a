//! The reconciler over tables that fail: what it writes is searched for contradictions after every single write.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey, ServiceName};
use ferroflow_common::addr::{Addr, Port, Proto};

use super::{Config, Limits, Reconciler, Stats};
use crate::maps::fake::{FakeMaps, Faults, Search, Sizes};
use crate::maps::{Backends, Endpoints, Frontends, Maps, Services, Slots};
use crate::model::service::Place;
use crate::model::{
    Change, Condition, Endpoint, EndpointSlice, Name, Node, Pod, Prefix, Service, ServicePort, SlicePort,
    TrafficPolicy, Withheld,
};
use crate::plan::{self, ExternalIps};

mod damaged;
mod exposed;
mod faults;
mod held;
mod host_ports;
mod isolated;
mod random;
mod services;

const GRACE: Duration = Duration::from_secs(5);
const SECONDS: u32 = 1_000;
const SIZES: Sizes = Sizes { hash: 1000, slots: 2000, backends: 1000 };

fn config() -> Config {
    let plan =
        plan::Config { external_ips: ExternalIps::Serve, maglev_lengths: &[7], ..plan::Config::default() };
    let limits = Limits { services: 100, frontends: 200 };
    Config { node: "here".into(), limits, plan, grace: GRACE, clock: || SECONDS }
}

/// A reconciler and its clock.
struct Run {
    it: Reconciler<FakeMaps>,
    now: Instant,
}

impl Run {
    fn new() -> Self {
        let mut run = Self::restart(FakeMaps::new(SIZES, Search::EveryWrite));
        run.it.synced();
        run
    }

    /// Over the tables another one left; not synced.
    fn restart(maps: FakeMaps) -> Self {
        let now = Instant::now();
        Self { it: Reconciler::restore(maps, &config(), now).unwrap(), now }
    }

    fn handle(&mut self, changes: &[Change]) -> &mut Self {
        for change in changes {
            self.it.handle(change.clone(), self.now);
        }
        self
    }

    /// Ticks until nothing is due, or what fails has failed often.
    fn settle(&mut self) -> &mut Self {
        for _ in 0..500 {
            let Some(due) = self.it.due() else { break };
            self.now = self.now.max(due);
            self.it.tick(self.now);
        }
        self
    }

    fn apply(&mut self, changes: &[Change]) -> &mut Self {
        self.handle(changes).settle();
        assert_eq!(self.it.failing().collect::<Vec<_>>(), []);
        self
    }

    fn stats(&self) -> Stats {
        self.it.stats()
    }

    fn errors(&self) -> Vec<String> {
        self.it.failing().map(|(key, error)| format!("{key}: {error}")).collect()
    }

    fn view(&self) -> BTreeMap<String, String> {
        view(self.it.maps())
    }
}

/// `10.96.0.1:80/TCP` -> `10.0.0.1:8080 10.0.0.2:8080`, as a program would find them.
fn view(maps: &FakeMaps) -> BTreeMap<String, String> {
    let names: BTreeMap<u32, ServiceName> = maps.dump::<Services>().unwrap().into_iter().collect();
    let rows = (1..maps.len::<Backends>()).map(|index| maps.read::<Backends>(index).unwrap());
    let known: Vec<_> = rows.filter(|row| row.flags & Backend::LIVE != 0).collect();
    let mut view = BTreeMap::new();
    for (key, row) in maps.dump::<Frontends>().unwrap() {
        if key.is_cluster_ip() {
            assert_eq!((row.length, row.flags), (0, Frontend::REJECT), "rule 19");
            assert!(names.contains_key(&row.service), "{key:?} has an id without a name");
            continue;
        }
        assert!(names.contains_key(&row.service), "{key:?} has an id without a name");
        let slots = (row.offset..row.offset + row.length).map(|slot| maps.read::<Slots>(slot).unwrap());
        let backends = slots.map(|index| maps.read::<Backends>(index).unwrap());
        let backends: BTreeSet<_> = backends.map(|row| format!("{}:{}", row.addr, row.port)).collect();
        if row.flags & Frontend::MAGLEV != 0 && backends.len() > 1 {
            assert_eq!(row.length, 7, "a Maglev table");
        } else {
            assert_eq!(row.length as usize, backends.len(), "a slot a backend");
        }
        let family = |addr: &Addr| addr.ip().is_ipv4();
        let chosen =
            known.iter().filter(|it| it.service == row.service && family(&it.addr) == family(&key.addr));
        let chosen: BTreeSet<_> =
            chosen.filter(|it| row.chooses(it)).map(|it| format!("{}:{}", it.addr, it.port)).collect();
        assert_eq!(chosen, backends, "rule 29: what may be remembered is what the slots name");
        let mut text = backends.into_iter().collect::<Vec<_>>().join(" ");
        if row.length == 0 && row.flags & Frontend::REJECT != 0 {
            text = "reject".into();
        }
        let scope = match key.scope {
            FrontendKey::INTERNAL => " internal",
            FrontendKey::OWN => " own",
            FrontendKey::RELAYED => " relayed",
            _ => "",
        };
        view.insert(format!("{}:{}/{}{scope}", key.addr, key.port, key.proto), text);
    }
    view
}

/// `default/web:http 10.0.0.1:8080/TCP` for each live row.
fn live(maps: &FakeMaps) -> BTreeSet<String> {
    let names: BTreeMap<u32, ServiceName> = maps.dump::<Services>().unwrap().into_iter().collect();
    let rows = (1..maps.len::<Backends>()).map(|index| maps.read::<Backends>(index).unwrap());
    let mut live = BTreeSet::new();
    for row in rows.filter(|row| row.flags & Backend::LIVE != 0) {
        let name = names.get(&row.service).expect("a live row has an id without a name");
        let text = format!("{} {}:{}/{}", name.as_str().unwrap(), row.addr, row.port, row.proto);
        assert!(live.insert(text.clone()), "{text} has two rows");
    }
    live
}

/// The index and row of the live backend at this address.
fn row_of(maps: &FakeMaps, addr: &str) -> (u32, Backend) {
    let rows = (1..maps.len::<Backends>()).map(|index| (index, maps.read::<Backends>(index).unwrap()));
    let mut rows = rows.filter(|(_, row)| row.flags & Backend::LIVE != 0 && row.addr == self::addr(addr));
    let row = rows.next().expect("no live row");
    assert_eq!(rows.next(), None);
    row
}

fn addr(text: &str) -> Addr {
    Addr::from(text.parse::<IpAddr>().unwrap())
}

fn name(text: &str) -> Name {
    Name::new("default", text)
}

/// A Service with ports given as `http:80`, or with a NodePort as `http:80/30080`.
fn service(service: &str, ips: &[&str], ports: &[&str]) -> Change {
    let ports = ports.iter().map(|text| {
        let (name, port) = text.split_once(':').unwrap();
        let (port, node_port) = port.split_once('/').unwrap_or((port, "0"));
        let number = |text: &str| Port::new(text.parse().unwrap());
        let node_port = Some(number(node_port)).filter(|it| *it != Port::ZERO);
        ServicePort { name: name.into(), proto: Proto::TCP, port: number(port), node_port }
    });
    let mut ports: Vec<_> = ports.collect();
    ports.sort_by(|a, b| a.name.cmp(&b.name));
    let cluster_ips = ips.iter().map(|text| addr(text)).collect();
    Change::Service(name(service), Some(Service { cluster_ips, ports: ports.into(), ..Service::default() }))
}

/// The same Service, but for what `change` does to it.
fn with(service: Change, change: impl FnOnce(&mut Service)) -> Change {
    let Change::Service(name, Some(mut object)) = service else { panic!("{service:?}") };
    change(&mut object);
    Change::Service(name, Some(object))
}

/// A slice whose endpoints listen on 8080 for the port `http`; `~` before an address is draining, `?` serving only,
/// `+` ready on this node.
fn slice(slice: &str, service: &str, endpoints: &[&str]) -> Change {
    let endpoints = endpoints.iter().map(|text| {
        let (condition, place, text) = match text.split_at(1) {
            ("~", text) => (Condition::Draining, Place::Remote, text),
            ("?", text) => (Condition::Serving, Place::Remote, text),
            ("+", text) => (Condition::Ready, Place::Local, text),
            _ => (Condition::Ready, Place::Remote, *text),
        };
        Endpoint::new(addr(text), condition, place)
    });
    let port = SlicePort { name: "http".into(), proto: Proto::TCP, port: Port::new(8080) };
    let endpoints = endpoints.collect();
    let object = EndpointSlice {
        service: service.into(),
        ports: [port].into(),
        endpoints,
        ..EndpointSlice::default()
    };
    Change::EndpointSlice(name(slice), Some(object))
}

fn gone(service: &str) -> Change {
    Change::Service(name(service), None)
}

fn web() -> [Change; 2] {
    [service("web", &["10.96.0.1"], &["http:80"]), slice("web-1", "web", &["10.0.0.1", "10.0.0.2"])]
}
