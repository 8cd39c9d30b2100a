//! Services and pods come, change and go.

use super::*;

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
    let pod = Pod { node: "here".into(), addresses: Box::new([addr("10.244.1.5")]), ..Pod::default() };
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
    assert_eq!(
        cost(&mut run, &[kept]),
        2 + 1 + 1,
        "rules 30 and 31: it serves, so its row stays, out of the set"
    );
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
    let offset = |run: &Run| {
        let rows = run.it.maps().dump::<Frontends>().unwrap();
        rows.into_iter().find(|(_, row)| row.length > 0).unwrap().1.offset
    };
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
fn of_two_services_with_one_address_the_first_by_name_has_it() {
    let mut run = Run::new();
    run.apply(&web());
    let zeta =
        [service("zeta", &["10.96.0.1"], &["http:80", "other:81"]), slice("zeta-1", "zeta", &["10.0.9.9"])];
    run.handle(&zeta).settle();
    let error = "Service default/zeta: 10.96.0.1 port 80/TCP belongs to Service default/web, which goes first (the \
                 older, or the first by name): change one of them";
    assert_eq!(run.errors(), [error]);
    assert_eq!(run.view()["10.96.0.1:80/TCP"], "10.0.0.1:8080 10.0.0.2:8080");
    assert_eq!(run.view()["10.96.0.1:81/TCP"], "reject", "the rest is served");
    // A restart does not turn it round.
    let mut next = Run::restart(run.it.maps().clone());
    next.handle(&zeta).handle(&web()).it.synced();
    next.settle();
    assert_eq!((next.errors().len(), next.view()), (1, run.view()));
    run.handle(&[gone("web")]);
    run.it.tick(run.now);
    assert_eq!(run.it.due(), Some(run.now), "the other does not wait for its next attempt");
    run.it.tick(run.now);
    assert_eq!((run.errors(), &*run.view()["10.96.0.1:80/TCP"]), (vec![], "10.0.9.9:8080"));
}

#[test]
fn of_services_with_one_frontend_the_oldest_has_it_in_whatever_order_they_come() {
    let claim = |name: &str, created, last: u8| {
        let object = service(name, &[&format!("10.96.0.{last}")], &["http:80/30080"]);
        let object = with(object, |it| {
            it.created = created;
            it.exposure.load_balancer_ips = Box::new([addr("192.0.2.1")]);
            // The internal rows go with the external ones.
            it.exposure.policy = [TrafficPolicy::Cluster, TrafficPolicy::Local][usize::from(last % 2)];
        });
        [object, slice(&format!("{name}-1"), name, &[&format!("+10.0.{last}.1")])]
    };
    let claims =
        [claim("a", None, 1), claim("b", Some(20), 2), claim("c", Some(10), 3), claim("d", Some(10), 4)];
    let mut views = BTreeSet::new();
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]] {
        let mut run = Run::new();
        for at in order {
            run.handle(&claims[at]).settle();
        }
        let failing: Vec<_> = run.errors().iter().map(|it| it[..17].to_owned()).collect();
        assert_eq!(failing, ["Service default/a", "Service default/b", "Service default/d"], "{order:?}");
        assert!(
            run.errors()[0].contains("NodePort 30080/TCP belongs to Service default/c"),
            "{:?}",
            run.errors()
        );
        assert_eq!(run.view()["192.0.2.1:80/TCP"], "10.0.3.1:8080");
        assert_eq!(run.view()["0.0.0.0:30080/TCP internal"], "10.0.3.1:8080");
        let mut next = Run::restart(run.it.maps().clone());
        next.handle(&claims.concat()).it.synced();
        next.settle();
        assert_eq!(next.view(), run.view(), "{order:?}");
        assert_eq!(next.it.maps().writes(), run.it.maps().writes(), "{order:?}");
        views.insert(run.view());
        // The next oldest follows.
        run.handle(&[gone("c")]).settle();
        assert_eq!(run.view()["192.0.2.1:80/TCP"], "10.0.4.1:8080");
        assert!(!run.view().contains_key("192.0.2.1:80/TCP internal"));
        run.it.maps().contradiction().unwrap();
    }
    assert_eq!(views.len(), 1);
}

#[test]
fn local_pods_follow_interfaces_and_pods() {
    let mut run = Run::new();
    let pod = Pod { node: "here".into(), addresses: Box::new([addr("10.244.1.5")]), ..Pod::default() };
    run.apply(&[Change::Pod(name("p"), Some(pod)), Change::LocalRoute(addr("10.244.1.5"), Some(7))]);
    let rows = |run: &Run| {
        let rows = run.it.maps().dump::<Endpoints>().unwrap();
        rows.into_iter().map(|(addr, row)| (addr.to_string(), row.ifindex())).collect::<Vec<_>>()
    };
    assert_eq!(rows(&run), [("10.244.1.5".into(), 7)]);
    run.apply(&[Change::LocalRoute(addr("10.244.1.5"), Some(8))]);
    assert_eq!(rows(&run), [("10.244.1.5".into(), 8)]);
    let mut next = Run::restart(run.it.maps().clone());
    next.it.synced();
    next.apply(&[]);
    assert_eq!(rows(&next), [], "the pod went while no agent ran");
}
