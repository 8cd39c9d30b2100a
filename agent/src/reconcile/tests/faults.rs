//! Writes that fail and an agent that dies.

use super::*;

/// Steps of a cluster's life; each step settles before the next.
fn life() -> Vec<Vec<Change>> {
    vec![
        vec![
            service("web", &["10.96.0.1", "fd00::1"], &["http:80", "admin:81"]),
            slice("web-4", "web", &["10.0.0.1", "10.0.0.2"]),
            slice("web-6", "web", &["fd01::1"]),
        ],
        vec![
            service("next", &["10.96.0.2"], &["http:80"]),
            slice("web-4", "web", &["10.0.0.2", "~10.0.0.1", "10.0.0.3"]),
        ],
        vec![
            slice("next-1", "next", &["10.0.1.1"]),
            service("web", &["10.96.0.1"], &["admin:80", "http:81"]),
            slice("web-6", "web", &[]),
        ],
        vec![
            gone("next"),
            service("able", &["10.96.0.2"], &["http:80"]),
            slice("able-1", "able", &["10.0.1.1", "10.0.1.2"]),
        ],
        vec![gone("web"), slice("able-1", "able", &["10.0.1.2"])],
        vec![exposed(TrafficPolicy::Local, &[10, 172]), slice("able-1", "able", &["10.0.1.2", "+10.0.1.3"])],
        vec![exposed(TrafficPolicy::Cluster, &[10, 11]), slice("able-1", "able", &["10.0.1.2", "10.0.1.3"])],
        // An older one takes the addresses over.
        vec![
            with(exposed(TrafficPolicy::Local, &[10]), |it| {
                it.created = Some(1);
                it.cluster_ips = Box::new([addr("10.96.0.3")]);
            })
            .renamed("older"),
            gone("able"),
        ],
        vec![with(exposed(TrafficPolicy::Local, &[]), |it| it.affinity = 9).renamed("older")],
    ]
}

/// The Service `able` behind a load balancer, for clients in these networks.
fn exposed(policy: TrafficPolicy, ranges: &[u8]) -> Change {
    with(service("able", &["10.96.0.2"], &["http:80/30080"]), |it| {
        it.exposure.policy = policy;
        it.exposure.load_balancer_ips = Box::new([addr("192.0.2.1")]);
        let ranges = ranges.iter().map(|first| Prefix::new(Addr::v4([*first, 0, 0, 0]), 8).unwrap());
        it.exposure.source_ranges = ranges.collect();
    })
}

trait Renamed {
    fn renamed(self, name: &str) -> Self;
}

impl Renamed for Change {
    fn renamed(self, to: &str) -> Self {
        let Self::Service(_, object) = self else { panic!("{self:?}") };
        Self::Service(name(to), object)
    }
}

/// What is known after some steps, as a source would list it.
fn known(steps: &[Vec<Change>]) -> Vec<Change> {
    steps.iter().flatten().cloned().collect()
}

#[test]
fn tables_that_fail_are_right_in_the_end() {
    for seed in 0..60 {
        let (mut right, mut faulty) = (Run::new(), Run::new());
        faulty.it.maps_mut().set_faults(Faults::Percent { seed, percent: 10 + seed / 3 });
        for step in life() {
            right.apply(&step);
            faulty.handle(&step).settle();
            assert_eq!(faulty.errors(), Vec::<String>::new(), "seed {seed}");
            assert_eq!(faulty.view(), right.view(), "seed {seed}");
            assert_eq!(live(faulty.it.maps()), live(right.it.maps()), "seed {seed}");
        }
        assert!(faulty.stats().failures > 0);
        let (Stats { slots, backends, services, .. }, it) = (right.stats(), faulty.stats());
        assert_eq!(
            (it.slots, it.backends, it.services),
            (slots, backends, services),
            "seed {seed}: nothing leaks"
        );
    }
}

#[test]
fn a_crash_at_any_write_is_made_good() {
    let life = life();
    let mut crashes = 0;
    for steps in 1..=life.len() {
        let (before, after) = (&life[..steps - 1], &life[..steps]);
        let mut right = Run::new();
        for step in before {
            right.apply(step);
        }
        let tables = right.it.maps().clone();
        right.apply(&life[steps - 1]);
        let needed = right.it.maps().writes() - tables.writes();
        for writes in 0..needed {
            let mut maps = tables.clone();
            maps.set_faults(Faults::After { writes });
            let mut dying = Run::restart(maps);
            dying.handle(&known(after)).it.synced();
            dying.it.tick(dying.now);
            let mut maps = dying.it.maps().clone();
            assert_eq!(maps.writes(), tables.writes() + writes);
            maps.set_faults(Faults::Never);
            let mut next = Run::restart(maps);
            next.it.synced();
            next.apply(&known(after));
            assert_eq!(next.view(), right.view(), "step {steps}, write {writes}");
            assert_eq!(live(next.it.maps()), live(right.it.maps()), "step {steps}, write {writes}");
            assert_eq!(next.stats().slots, right.stats().slots, "step {steps}, write {writes}");
            assert_eq!(next.it.maps().dump::<Services>().unwrap().len(), right.stats().services);
            crashes += 1;
        }
    }
    assert!(crashes > 40, "{crashes}");
}

#[test]
fn a_failure_keeps_old_backends_until_the_new_ones_are_named() {
    let mut run = Run::new();
    run.apply(&web());
    for writes in 0..5 {
        run.it.maps_mut().set_faults(Faults::After { writes });
        let endpoint = format!("10.0.5.{writes}");
        run.handle(&[slice("web-1", "web", &[&endpoint, "10.0.0.2"])]);
        run.it.tick(run.now);
        run.it.maps().contradiction().unwrap();
        run.it.maps_mut().set_faults(Faults::Never);
        run.settle();
        assert_eq!(run.view()["10.96.0.1:80/TCP"], format!("10.0.0.2:8080 {endpoint}:8080"));
    }
}
