//! Random lives of a cluster, with failing writes and restarts, against a naive model.

use super::*;

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

type Ports = Vec<(&'static str, Proto, u16)>;

/// The cluster as plain lists.
#[derive(Default)]
struct Naive {
    services: BTreeMap<usize, (Vec<Addr>, Ports)>,
    slices: BTreeMap<usize, NaiveSlice>,
}

struct NaiveSlice {
    service: usize,
    ports: Ports,
    endpoints: Vec<(Addr, Condition)>,
}

const NAMES: [&str; 3] = ["a", "b", "c"];
const PROTOS: [Proto; 2] = [Proto::TCP, Proto::UDP];
const CONDITIONS: [Condition; 4] =
    [Condition::Ready, Condition::Draining, Condition::Serving, Condition::Down];

impl Naive {
    fn change(&mut self, dice: &mut Dice) -> Change {
        if dice.chance(40) { self.change_service(dice) } else { self.change_slice(dice) }
    }

    fn change_service(&mut self, dice: &mut Dice) -> Change {
        let number = dice.below(5);
        if dice.chance(30) {
            self.services.remove(&number);
            return Change::Service(name(&format!("s{number}")), None);
        }
        let (v4, v6) = (Addr::v4([10, 96, 0, number as u8]), Addr::v6([0xfd; 16]));
        let v6 = Addr {
            bytes: {
                let mut bytes = v6.bytes;
                bytes[15] = number as u8;
                bytes
            },
        };
        let ips = [vec![v4], vec![v6], vec![v4, v6]][dice.below(3)].clone();
        let mut ports = Ports::new();
        for name in &NAMES[..1 + dice.below(3)] {
            let (proto, port) = (PROTOS[dice.below(2)], 80 + dice.below(2) as u16);
            if !ports.iter().any(|it| (it.1, it.2) == (proto, port)) {
                ports.push((name, proto, port));
            }
        }
        self.services.insert(number, (ips.clone(), ports.clone()));
        let ports = ports.iter().map(|&(name, proto, port)| ServicePort {
            name: name.into(),
            proto,
            port: Port::new(port),
            node_port: None,
        });
        let object = Service { cluster_ips: ips.into(), ports: ports.collect(), ..Service::default() };
        Change::Service(name(&format!("s{number}")), Some(object))
    }

    fn change_slice(&mut self, dice: &mut Dice) -> Change {
        let number = dice.below(10);
        if dice.chance(20) {
            self.slices.remove(&number);
            return Change::EndpointSlice(name(&format!("e{number}")), None);
        }
        let service = dice.below(5);
        let ports: Ports = NAMES
            .iter()
            .filter(|_| dice.below(3) > 0)
            .copied()
            .collect::<Vec<_>>()
            .into_iter()
            .map(|name| (name, PROTOS[dice.below(2)], 8080 + dice.below(2) as u16))
            .collect();
        let endpoints: Vec<_> = (0..dice.below(5))
            .map(|_| {
                let last = dice.below(4) as u8;
                let addr =
                    if dice.chance(60) { Addr::v4([10, 0, 0, last]) } else { Addr::v6([last + 1; 16]) };
                (addr, CONDITIONS[dice.below(4)])
            })
            .collect();
        let slice = NaiveSlice { service, ports: ports.clone(), endpoints: endpoints.clone() };
        self.slices.insert(number, slice);
        let ports = ports.iter().map(|&(name, proto, port)| SlicePort {
            name: name.into(),
            proto,
            port: Port::new(port),
        });
        let endpoints =
            endpoints.iter().map(|&(addr, condition)| Endpoint::new(addr, condition, Place::Remote));
        let object = EndpointSlice {
            service: format!("s{service}").into(),
            ports: ports.collect(),
            endpoints: endpoints.collect(),
            ..EndpointSlice::default()
        };
        Change::EndpointSlice(name(&format!("e{number}")), Some(object))
    }

    /// All endpoints of a service port in the family of `ip` and in these conditions, as texts.
    fn endpoints(
        &self,
        service: usize,
        port: (&str, Proto),
        ip: &Addr,
        wanted: &[Condition],
    ) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for slice in self.slices.values().filter(|slice| slice.service == service) {
            for (_, _, number) in slice.ports.iter().filter(|it| (it.0, it.1) == port) {
                for (addr, condition) in &slice.endpoints {
                    if addr.ip().is_ipv4() == ip.ip().is_ipv4() && wanted.contains(condition) {
                        found.insert(format!("{addr}:{number}"));
                    }
                }
            }
        }
        found
    }

    fn view(&self) -> BTreeMap<String, String> {
        let mut view = BTreeMap::new();
        for (&service, (ips, ports)) in &self.services {
            for ip in ips {
                for &(name, proto, port) in ports {
                    let of = |wanted| self.endpoints(service, (name, proto), ip, wanted);
                    let ready = of(&[Condition::Ready]);
                    let chosen = if ready.is_empty() { of(&[Condition::Draining]) } else { ready };
                    let text = chosen.into_iter().collect::<Vec<_>>().join(" ");
                    let text = if text.is_empty() { "reject".into() } else { text };
                    view.insert(format!("{ip}:{port}/{proto}"), text);
                }
            }
        }
        view
    }

    fn live(&self) -> BTreeSet<String> {
        let mut live = BTreeSet::new();
        for (&service, (ips, ports)) in &self.services {
            for ip in ips {
                for &(name, proto, _) in ports {
                    let serving = [Condition::Ready, Condition::Draining, Condition::Serving];
                    for it in self.endpoints(service, (name, proto), ip, &serving) {
                        live.insert(format!("default/s{service}:{name} {it}/{proto}"));
                    }
                }
            }
        }
        live
    }
}

#[test]
fn random_lives_agree_with_a_naive_model() {
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
            run.settle();
            run.now += Duration::from_secs(dice.below(8) as u64);
            assert_eq!(run.errors(), Vec::<String>::new(), "seed {seed}, step {step}");
            assert_eq!(run.view(), naive.view(), "seed {seed}, step {step}");
            assert_eq!(live(run.it.maps()), naive.live(), "seed {seed}, step {step}");
            assert_eq!(run.stats().backends, naive.live().len(), "seed {seed}, step {step}: no index leaks");
        }
    }
}

fn key(change: &Change) -> String {
    match change {
        Change::Service(name, _) => format!("s {name}"),
        Change::EndpointSlice(name, _) => format!("e {name}"),
        Change::Node(..) | Change::Pod(..) | Change::LocalRoute(..) => unreachable!("not generated"),
    }
}
