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
use crate::model::{Change, Condition, Endpoint, EndpointSlice, Name, Pod, Service, ServicePort, SlicePort};

mod faults;
mod random;

const GRACE: Duration = Duration::from_secs(5);
const SIZES: Sizes = Sizes { hash: 1000, slots: 2000, backends: 1000 };

fn config() -> Config {
    Config { node: "here".into(), limits: Limits { services: 100, frontends: 200 }, grace: GRACE }
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
    let mut view = BTreeMap::new();
    for (key, row) in maps.dump::<Frontends>().unwrap() {
        assert!(names.contains_key(&row.service), "{key:?} has an id without a name");
        let slots = (row.offset..row.offset + row.length).map(|slot| maps.read::<Slots>(slot).unwrap());
        let backends = slots.map(|index| maps.read::<Backends>(index).unwrap());
        let backends: BTreeSet<_> = backends.map(|row| format!("{}:{}", row.addr, row.port)).collect();
        let mut text = backends.into_iter().collect::<Vec<_>>().join(" ");
        if row.length == 0 && row.flags & Frontend::REJECT != 0 {
            text = "reject".into();
        }
        view.insert(format!("{}:{}/{}", key.addr, key.port, key.proto), text);
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

/// A Service with ports given as `http:80`.
fn service(service: &str, ips: &[&str], ports: &[&str]) -> Change {
    let ports = ports.iter().map(|text| {
        let (name, port) = text.split_once(':').unwrap();
        ServicePort { name: name.into(), proto: Proto::TCP, port: Port::new(port.parse().unwrap()) }
    });
    let mut ports: Vec<_> = ports.collect();
    ports.sort_by(|a, b| a.name.cmp(&b.name));
    let cluster_ips = ips.iter().map(|text| addr(text)).collect();
    Change::Service(name(service), Some(Service { cluster_ips, ports: ports.into() }))
}

/// A slice whose endpoints listen on 8080 for the port `http`; `~` before an address is draining, `?` serving only.
fn slice(slice: &str, service: &str, endpoints: &[&str]) -> Change {
    let endpoints = endpoints.iter().map(|text| {
        let (condition, text) = match text.split_at(1) {
            ("~", text) => (Condition::Draining, text),
            ("?", text) => (Condition::Serving, text),
            _ => (Condition::Ready, *text),
        };
        Endpoint { addr: addr(text), condition, place: Place::Remote }
    });
    let port = SlicePort { name: "http".into(), proto: Proto::TCP, port: Port::new(8080) };
    let object =
        EndpointSlice { service: service.into(), ports: Box::new([port]), endpoints: endpoints.collect() };
    Change::EndpointSlice(name(slice), Some(object))
}

fn gone(service: &str) -> Change {
    Change::Service(name(service), None)
}

fn web() -> [Change; 2] {
    [service("web", &["10.96.0.1"], &["http:80"]), slice("web-1", "web", &["10.0.0.1", "10.0.0.2"])]
}

#[test]
fn a_dual_stack_service_is_programmed_and_removed() {
    let mut run = Run::new();
    run.apply(&[
        service("web", &["10.96.0.1", "fd00::1"], &["http:80", "admin:81"]),
        slice("web-4", "web", &["10.0.0.1", "10.0.0.2"]),
        slice("web-6", "web", &["fd01::1"]),
    ]);
    let expected = [
        ("10.96.0.1:80/TCP", "10.0.0.1:8080 10.0.0.2:8080"),
        ("10.96.0.1:81/TCP", "reject"),
        ("fd00::1:80/TCP", "fd01::1:8080"),
        ("fd00::1:81/TCP", "reject"),
    ];
    assert_eq!(run.view(), expected.map(|(key, value)| (key.into(), value.into())).into());
    assert_eq!(live(run.it.maps()).len(), 3);
    run.apply(&[gone("web")]);
    assert_eq!((run.view().len(), live(run.it.maps()).len()), (0, 0));
    assert_eq!(run.it.maps().dump::<Services>().unwrap(), []);
    let Stats { services, frontends, backends, slots, .. } = run.stats();
    assert_eq!((services, frontends, backends, slots), (0, 0, 0, 0));
}

#[test]
fn rule_13_nothing_is_written_before_every_source_has_listed() {
    let mut run = Run::new();
    run.apply(&web());
    let before = run.it.maps().writes();
    let mut next = Run::restart(run.it.maps().clone());
    next.handle(&[service("other", &["10.96.0.2"], &["http:80"])]).settle();
    assert_eq!((next.it.due(), next.it.maps().writes()), (None, before));
    assert_eq!(next.view(), run.view());
    next.it.synced();
    next.settle();
    assert_eq!(next.view().into_keys().collect::<Vec<_>>(), ["10.96.0.2:80/TCP"], "web is pruned");
}

#[test]
fn a_restart_with_an_unchanged_cluster_writes_nothing() {
    let mut run = Run::new();
    let pod = Pod { node: "here".into(), addresses: Box::new([addr("10.244.1.5")]) };
    let mut changes = vec![
        service("web", &["10.96.0.1", "fd00::1"], &["http:80", "admin:81"]),
        slice("web-4", "web", &["10.0.0.1", "~10.0.0.2"]),
        slice("web-6", "web", &["~fd01::1", "?fd01::2"]),
        service("none", &["10.96.0.2"], &["http:80"]),
        Change::Pod(name("p"), Some(pod)),
        Change::LocalRoute(addr("10.244.1.5"), Some(7)),
    ];
    run.apply(&changes).apply(&[slice("web-4", "web", &["10.0.0.3"])]);
    changes[1] = slice("web-4", "web", &["10.0.0.3"]);
    let mut next = Run::restart(run.it.maps().clone());
    let before = next.it.maps().writes();
    next.handle(&changes);
    next.it.synced();
    next.settle();
    assert_eq!(next.it.maps().writes(), before);
    assert_eq!(Stats { failures: 0, ..next.stats() }, run.stats());
}

#[test]
fn a_change_writes_what_it_names() {
    let mut run = Run::new();
    run.apply(&web()).apply(&[service("other", &["10.96.0.2"], &["http:80"])]);
    let mut before = run.stats().writes;
    let mut cost = |run: &mut Run, changes: &[Change]| {
        run.apply(changes);
        let now = run.stats().writes;
        now - std::mem::replace(&mut before, now)
    };
    assert_eq!(cost(&mut run, &web()), 0);
    let three = slice("web-1", "web", &["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    assert_eq!(cost(&mut run, &[three]), 1 + 3 + 1, "a backend, three slots, the frontend");
    let kept = slice("web-1", "web", &["10.0.0.1", "?10.0.0.2", "10.0.0.3"]);
    assert_eq!(cost(&mut run, &[kept]), 2 + 1, "rules 30 and 31: it serves, so its row stays");
    let gone = slice("web-1", "web", &["10.0.0.1", "10.0.0.3"]);
    assert_eq!(cost(&mut run, &[gone]), 1, "only its row is released");
}

#[test]
fn rules_31_and_32_a_backend_that_is_gone_has_a_new_generation() {
    let mut run = Run::new();
    run.apply(&web());
    let (index, row) = row_of(run.it.maps(), "10.0.0.1");
    run.apply(&[slice("web-1", "web", &["10.0.0.2"])]);
    let released = run.it.maps().read::<Backends>(index).unwrap();
    assert_eq!((released.flags, released.generation), (0, row.generation + 1));
    // It rests: another endpoint gets another row.
    run.apply(&[slice("web-1", "web", &["10.0.0.2", "10.0.0.3"])]);
    assert_ne!(row_of(run.it.maps(), "10.0.0.3").0, index);
    run.now += GRACE;
    run.apply(&[slice("web-1", "web", &["10.0.0.2", "10.0.0.3", "10.0.0.4"])]);
    let (reused, row) = row_of(run.it.maps(), "10.0.0.4");
    assert_eq!((reused, row.generation), (index, released.generation));
    // Rule 32: the service is deleted, and N -> 0.
    let last = row_of(run.it.maps(), "10.0.0.2");
    run.apply(&[slice("web-1", "web", &[])]);
    assert_eq!(run.view()["10.96.0.1:80/TCP"], "reject", "rule 14");
    assert_eq!(run.it.maps().read::<Backends>(last.0).unwrap().generation, last.1.generation + 1);
}

#[test]
fn slots_rest_before_they_are_reused() {
    let mut run = Run::new();
    run.apply(&web());
    let offset = |run: &Run| run.it.maps().dump::<Frontends>().unwrap()[0].1.offset;
    let first = offset(&run);
    run.apply(&[slice("web-1", "web", &["10.0.0.1", "10.0.0.3"])]);
    let second = offset(&run);
    assert_ne!(first, second);
    run.apply(&[slice("web-1", "web", &["10.0.0.1", "10.0.0.4"])]);
    assert_ne!(first, offset(&run));
    run.now += GRACE;
    run.apply(&[slice("web-1", "web", &["10.0.0.1", "10.0.0.5"])]);
    assert_eq!(first, offset(&run));
}

#[test]
fn ports_that_are_renamed_or_swapped_keep_their_frontends() {
    let mut run = Run::new();
    run.apply(&web());
    run.apply(&[service("web", &["10.96.0.1"], &["web:80", "http:81"])]);
    let expected = [("10.96.0.1:80/TCP", "reject"), ("10.96.0.1:81/TCP", "10.0.0.1:8080 10.0.0.2:8080")];
    assert_eq!(run.view(), expected.map(|(key, value)| (key.into(), value.into())).into());
    run.apply(&[service("web", &["10.96.0.1"], &["web:81", "http:80"])]);
    let expected = [("10.96.0.1:80/TCP", "10.0.0.1:8080 10.0.0.2:8080"), ("10.96.0.1:81/TCP", "reject")];
    assert_eq!(run.view(), expected.map(|(key, value)| (key.into(), value.into())).into());
    run.apply(&[service("web", &["10.96.0.1"], &["new:80"])]);
    assert_eq!(run.view(), BTreeMap::from([("10.96.0.1:80/TCP".into(), "reject".into())]));
    assert_eq!((run.stats().services, run.stats().slots), (1, 0));
}

#[test]
fn an_address_passes_from_a_service_that_gave_it_up_to_another() {
    let mut run = Run::new();
    run.apply(&web());
    // `able` comes before `web` in the queue.
    run.apply(&[
        gone("web"),
        service("able", &["10.96.0.1"], &["http:80"]),
        slice("able-1", "able", &["10.0.9.9"]),
    ]);
    assert_eq!(run.view(), BTreeMap::from([("10.96.0.1:80/TCP".into(), "10.0.9.9:8080".into())]));
    assert_eq!((run.stats().services, run.stats().slots, run.stats().backends), (1, 1, 1));
}

#[test]
fn of_two_services_with_one_address_the_first_keeps_it() {
    let mut run = Run::new();
    run.apply(&web());
    let able =
        [service("able", &["10.96.0.1"], &["http:80", "other:81"]), slice("able-1", "able", &["10.0.9.9"])];
    run.handle(&able).settle();
    let error = "Service default/able: 10.96.0.1 port 80/TCP belongs to Service default/web, which had it first: \
                 change one of them";
    assert_eq!(run.errors(), [error]);
    assert_eq!(run.view()["10.96.0.1:80/TCP"], "10.0.0.1:8080 10.0.0.2:8080");
    assert_eq!(run.view()["10.96.0.1:81/TCP"], "reject", "the rest is served");
    // A restart does not turn it round.
    let mut next = Run::restart(run.it.maps().clone());
    next.handle(&able).handle(&web()).it.synced();
    next.settle();
    assert_eq!((next.errors().len(), next.view()), (1, run.view()));
    run.handle(&[gone("web")]);
    run.it.tick(run.now);
    assert_eq!(run.it.due(), Some(run.now), "the other does not wait for its next attempt");
    run.it.tick(run.now);
    assert_eq!((run.errors(), &*run.view()["10.96.0.1:80/TCP"]), (vec![], "10.0.9.9:8080"));
}

#[test]
fn a_table_that_is_full_is_an_error_of_one_service_and_leaves_it_whole() {
    let tight = |sizes: Sizes, limits: Limits| {
        let now = Instant::now();
        let config = Config { limits, ..config() };
        let it = Reconciler::restore(FakeMaps::new(sizes, Search::EveryWrite), &config, now).unwrap();
        let mut run = Run { it, now };
        run.it.synced();
        run.apply(&web());
        let before = run.it.maps().clone();
        run.handle(&[
            service("more", &["10.96.0.2"], &["http:80", "admin:81"]),
            slice("more-1", "more", &["10.0.1.1", "10.0.1.2"]),
        ]);
        run.settle();
        assert_eq!(view(&before), run.view());
        assert_eq!(before.writes(), run.it.maps().writes(), "nothing is half written");
        let error = run.errors().pop().unwrap();
        // Room again: what failed is tried again by itself.
        run.handle(&[gone("web")]).settle();
        run.now += GRACE;
        run.settle();
        assert_eq!((run.errors(), run.view().len()), (vec![], 2));
        error
    };
    let limits = Limits { services: 100, frontends: 100 };
    let say = |table: &str, asked: u32, limit: u32| {
        format!(
            "Service default/more: table `{table}` has no room for {asked} more rows of {limit}: raise its size"
        )
    };
    assert_eq!(tight(Sizes { backends: 4, ..SIZES }, limits), say("backends", 1, 3));
    assert_eq!(tight(Sizes { slots: 3, ..SIZES }, limits), say("slots", 2, 3));
    assert_eq!(tight(SIZES, Limits { services: 2, ..limits }), say("services", 1, 2));
    assert_eq!(tight(SIZES, Limits { frontends: 2, ..limits }), say("frontends", 1, 2));
}

#[test]
fn damaged_tables_are_repaired() {
    let mut run = Run::new();
    run.apply(&web());
    let right = run.view();
    let (_, backend) = row_of(run.it.maps(), "10.0.0.1");
    let mut maps = FakeMaps::new(SIZES, Search::Never);
    let key = |last: u8| FrontendKey {
        addr: Addr::v4([10, 96, 0, last]),
        port: Port::new(80),
        proto: Proto::TCP,
        scope: FrontendKey::ANY,
    };
    let frontend = Frontend { service: 9, offset: 1999, length: 5, flags: 0, affinity: 3 };
    maps.put::<Frontends>(&key(1), &frontend).unwrap();
    maps.put::<Frontends>(&key(7), &Frontend { service: u32::MAX, offset: 3, length: 2, ..frontend })
        .unwrap();
    maps.put::<Frontends>(&key(8), &Frontend { service: 0, offset: u32::MAX, length: 2, ..frontend })
        .unwrap();
    for (id, text) in [(9, "default/web:http"), (10, "default/web:http"), (11, "nonsense"), (12, "gone/gone")]
    {
        maps.put::<Services>(&id, &ServiceName::new(text).unwrap()).unwrap();
    }
    for (index, service) in [(3, 9), (4, 9), (5, 10), (6, 77)] {
        maps.write::<Backends>(index, &Backend { service, ..backend }).unwrap();
    }
    let mut next = Run::restart(maps);
    next.it.synced();
    next.apply(&web());
    assert_eq!(next.view(), right);
    assert_eq!(live(next.it.maps()), live(run.it.maps()));
    next.it.maps().contradiction().unwrap();
    assert_eq!(next.it.maps().dump::<Services>().unwrap().len(), 1);
    let Stats { services, frontends, backends, slots, .. } = next.stats();
    assert_eq!((services, frontends, backends, slots), (1, 1, 2, 2));
}

#[test]
fn ranges_that_overlap_are_not_kept() {
    let mut run = Run::new();
    run.apply(&web());
    let (key, right) = run.it.maps().dump::<Frontends>().unwrap()[0];
    let mut maps = FakeMaps::new(SIZES, Search::Never);
    maps.put::<Services>(&right.service, &ServiceName::new("default/web:http").unwrap()).unwrap();
    for index in 1..=2 {
        maps.write::<Backends>(index, &run.it.maps().read::<Backends>(index).unwrap()).unwrap();
        maps.write::<Slots>(right.offset + index - 1, &index).unwrap();
    }
    maps.put::<Frontends>(&key, &right).unwrap();
    // Comes first, and lies over the second half of the right one.
    let other = FrontendKey { addr: addr("10.96.0.0"), ..key };
    maps.put::<Frontends>(&other, &Frontend { offset: right.offset + 1, ..right }).unwrap();
    let mut next = Run::restart(maps);
    next.it.synced();
    next.apply(&web());
    next.now += GRACE;
    for service in ["a", "b", "c"] {
        let endpoints = slice(service, service, &["10.0.7.1", "10.0.7.2"]);
        next.apply(&[
            self::service(service, &[&format!("10.97.0.{}", service.len())], &["http:80"]),
            endpoints,
        ]);
        next.it.maps().contradiction().unwrap();
        next.apply(&[gone(service)]);
        next.now += GRACE;
    }
    assert_eq!(next.view(), run.view());
}

#[test]
fn local_pods_follow_interfaces_and_pods() {
    let mut run = Run::new();
    let pod = Pod { node: "here".into(), addresses: Box::new([addr("10.244.1.5")]) };
    run.apply(&[Change::Pod(name("p"), Some(pod)), Change::LocalRoute(addr("10.244.1.5"), Some(7))]);
    let rows = |run: &Run| {
        let rows = run.it.maps().dump::<Endpoints>().unwrap();
        rows.into_iter().map(|(addr, row)| (addr.to_string(), row.ifindex)).collect::<Vec<_>>()
    };
    assert_eq!(rows(&run), [("10.244.1.5".into(), 7)]);
    run.apply(&[Change::LocalRoute(addr("10.244.1.5"), Some(8))]);
    assert_eq!(rows(&run), [("10.244.1.5".into(), 8)]);
    let mut next = Run::restart(run.it.maps().clone());
    next.it.synced();
    next.apply(&[]);
    assert_eq!(rows(&next), [], "the pod went while no agent ran");
}
