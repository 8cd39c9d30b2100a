//! Tables that are full or that another writer has damaged.

use super::*;

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
    // A row says that its address is a cluster IP, one that its port is served.
    assert_eq!(tight(SIZES, Limits { frontends: 3, ..limits }), say("frontends", 1, 3));
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
        scope: FrontendKey::EXTERNAL,
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
            super::service(service, &[&format!("10.97.0.{}", service.len())], &["http:80"]),
            endpoints,
        ]);
        next.it.maps().contradiction().unwrap();
        next.apply(&[gone(service)]);
        next.now += GRACE;
    }
    assert_eq!(next.view(), run.view());
}
