//! Services that are reached from outside: NodePorts, load balancers, policies, affinity.

use ferroflow_common::abi::lb::SourceRangeKey;

use super::*;
use crate::maps::SourceRanges;
use crate::model::service::NodeHint;

fn exposed(change: impl FnOnce(&mut Service)) -> Change {
    with(service("web", &["10.96.0.1"], &["http:80/30080"]), |it| {
        it.exposure.load_balancer_ips = Box::new([addr("192.0.2.1")]);
        it.exposure.external_ips = Box::new([addr("192.0.2.9")]);
        change(it);
    })
}

fn local(it: &mut Service) {
    it.exposure.policy = TrafficPolicy::Local;
}

fn expect(run: &Run, expected: &[(&str, &str)]) {
    let expected = expected.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    assert_eq!(run.view(), expected);
}

fn row(run: &Run, ip: &str, port: u16, scope: u8) -> Frontend {
    let key = FrontendKey { addr: addr(ip), port: Port::new(port), proto: Proto::TCP, scope };
    let rows = run.it.maps().dump::<Frontends>().unwrap();
    rows.into_iter().find(|(other, _)| *other == key).expect("no such frontend").1
}

fn ranges(run: &Run) -> BTreeSet<String> {
    let rows = run.it.maps().dump::<SourceRanges>().unwrap();
    rows.iter().map(|(key, verdict)| format!("{}/{}={verdict}", key.data.addr, key.bits - 32 - 96)).collect()
}

fn prefix(text: &str) -> Prefix {
    let (at, length) = text.split_once('/').unwrap();
    Prefix::new(addr(at), length.parse().unwrap()).unwrap()
}

#[test]
fn frontends_with_the_same_set_share_their_slots() {
    let mut run = Run::new();
    run.apply(&[exposed(|_| {}), slice("web-1", "web", &["10.0.0.1", "+10.0.0.2"])]);
    let all = "10.0.0.1:8080 10.0.0.2:8080";
    expect(
        &run,
        &[
            ("10.96.0.1:80/TCP", all),
            ("192.0.2.1:80/TCP", all),
            ("192.0.2.9:80/TCP", all),
            ("0.0.0.0:30080/TCP", all),
        ],
    );
    assert_eq!(run.stats().slots, 2 + 7, "the cluster IP has its own, the others one table");
    let node = row(&run, "0.0.0.0", 30080, FrontendKey::EXTERNAL);
    assert_eq!(node.flags, Frontend::NORTH_SOUTH | Frontend::MAGLEV);
    assert_eq!(row(&run, "10.96.0.1", 80, FrontendKey::EXTERNAL).flags, 0);
    run.apply(&[gone("web")]);
    assert_eq!((run.view().len(), run.stats().slots), (0, 0));
}

#[test]
fn rules_15_and_16_outside_traffic_stays_here_and_inside_traffic_goes_anywhere() {
    let mut run = Run::new();
    run.apply(&[exposed(local), slice("web-1", "web", &["10.0.0.1", "+10.0.0.2"])]);
    let all = "10.0.0.1:8080 10.0.0.2:8080";
    let here = "10.0.0.2:8080";
    expect(
        &run,
        &[
            ("10.96.0.1:80/TCP", all),
            ("192.0.2.1:80/TCP", here),
            ("192.0.2.1:80/TCP internal", all),
            ("192.0.2.9:80/TCP", here),
            ("192.0.2.9:80/TCP internal", all),
            ("0.0.0.0:30080/TCP", here),
            ("0.0.0.0:30080/TCP internal", all),
        ],
    );
    let outside = row(&run, "192.0.2.1", 80, FrontendKey::EXTERNAL);
    let flags = Frontend::NORTH_SOUTH | Frontend::KEEP_CLIENT | Frontend::LOCAL | Frontend::INTERNAL_ROW;
    assert_eq!(outside.flags & !Frontend::MAGLEV, flags);
    let inside = row(&run, "192.0.2.1", 80, FrontendKey::INTERNAL);
    assert_eq!(inside.flags, Frontend::NORTH_SOUTH | Frontend::KEEP_CLIENT | Frontend::MAGLEV);
    assert_eq!(row_of(run.it.maps(), "10.0.0.1").1.flags, Backend::LIVE | Backend::CLUSTER);
    assert_eq!(row_of(run.it.maps(), "10.0.0.2").1.flags, Backend::LIVE | Backend::CLUSTER | Backend::LOCAL);
    run.apply(&[slice("web-1", "web", &["10.0.0.1"])]);
    assert_eq!(
        (&*run.view()["0.0.0.0:30080/TCP"], &*run.view()["0.0.0.0:30080/TCP internal"]),
        ("", "10.0.0.1:8080")
    );
    run.apply(&[slice("web-1", "web", &[])]);
    assert!(run.view().values().all(|it| it == "reject"), "rule 14");
    // Back to Cluster: the internal rows go.
    run.apply(&[exposed(|_| {})]);
    assert_eq!(run.view().len(), 4);
}

#[test]
fn rules_15_and_18_the_internal_policy_is_for_cluster_ips() {
    let mut run = Run::new();
    let web = exposed(|it| it.internal_policy = TrafficPolicy::Local);
    run.apply(&[web, slice("web-1", "web", &["10.0.0.1"])]);
    assert_eq!((&*run.view()["10.96.0.1:80/TCP"], &*run.view()["192.0.2.1:80/TCP"]), ("", "10.0.0.1:8080"));
    assert_eq!(row(&run, "10.96.0.1", 80, FrontendKey::EXTERNAL).flags, Frontend::LOCAL, "dropped");
}

#[test]
fn rule_29_affinity_is_switched_at_once_and_sets_are_marked() {
    let mut run = Run::new();
    run.apply(&[exposed(|it| it.affinity = 100), slice("web-1", "web", &["10.0.0.1", "10.0.0.2"])]);
    for (ip, port) in [("10.96.0.1", 80), ("192.0.2.1", 80), ("0.0.0.0", 30080)] {
        assert_eq!(row(&run, ip, port, FrontendKey::EXTERNAL).affinity, 100);
    }
    let before = run.stats().writes;
    run.apply(&[exposed(|_| {})]);
    assert_eq!(run.stats().writes - before, 4, "the frontends, and not their slots");
    run.apply(&[slice("web-1", "web", &["~10.0.0.1", "10.0.0.2"])]);
    assert_eq!(row_of(run.it.maps(), "10.0.0.1").1.flags, Backend::LIVE, "not chosen, and not remembered");
}

#[test]
fn rule_22_ranges_come_before_and_go_after_the_frontends_that_ask_for_them() {
    let mut run = Run::new();
    let with_ranges = |ranges: &[&str]| {
        let ranges = ranges.iter().map(|text| prefix(text)).collect();
        exposed(|it| it.exposure.source_ranges = ranges)
    };
    let here = |ip: &str| {
        let node = Node { addresses: Box::new([addr(ip)]), ..Node::default() };
        Change::Node("here".into(), Some(node))
    };
    run.apply(&[with_ranges(&["10.0.0.0/8", "172.16.0.0/12"]), slice("web-1", "web", &["10.0.0.1"])]);
    assert_eq!(ranges(&run), ["10.0.0.0/8=1", "172.16.0.0/12=1"].map(String::from).into());
    let guarded = |run: &Run, ip: &str, port| {
        row(run, ip, port, FrontendKey::EXTERNAL).flags & Frontend::SOURCE_RANGES != 0
    };
    assert!(guarded(&run, "192.0.2.1", 80));
    assert!(
        !guarded(&run, "0.0.0.0", 30080)
            && !guarded(&run, "10.96.0.1", 80)
            && !guarded(&run, "192.0.2.9", 80)
    );
    run.apply(&[with_ranges(&["10.0.0.0/8", "198.51.100.0/24"])]);
    assert_eq!(ranges(&run), ["10.0.0.0/8=1", "198.51.100.0/24=1"].map(String::from).into());
    run.apply(&[here("10.1.1.1")]);
    assert_eq!(ranges(&run).len(), 3, "the load balancer's own address");
    let mut next = Run::restart(run.it.maps().clone());
    next.handle(&[here("10.1.1.1"), with_ranges(&["10.0.0.0/8", "198.51.100.0/24"])]);
    next.handle(&[slice("web-1", "web", &["10.0.0.1"])]).it.synced();
    next.apply(&[]);
    assert_eq!(next.it.maps().writes(), run.it.maps().writes());
    run.apply(&[with_ranges(&[])]);
    assert!(ranges(&run).is_empty() && !guarded(&run, "192.0.2.1", 80));
    next.apply(&[gone("web")]);
    assert!(ranges(&next).is_empty());
    let stray: Vec<(SourceRangeKey, u32)> = next.it.maps().dump::<SourceRanges>().unwrap();
    assert_eq!(stray, []);
}

#[test]
fn rule_6_another_zone_moves_what_has_hints() {
    let mut run = Run::new();
    let mut hinted = slice("web-1", "web", &["10.0.0.1", "10.0.0.2"]);
    if let Change::EndpointSlice(_, Some(slice)) = &mut hinted {
        slice.zones = ["a", "b"].map(|zone| Box::new([zone.into()]) as Box<[_]>).into();
        slice.endpoints[0].zone_hint = 1;
        slice.endpoints[1].zone_hint = 2;
        assert_eq!(slice.endpoints[0].node_hint, NodeHint::Unsaid);
    }
    let here = |zone: Option<&str>| {
        let node = Node { zone: zone.map(Into::into), ..Node::default() };
        Change::Node("here".into(), Some(node))
    };
    run.apply(&[service("web", &["10.96.0.1"], &["http:80"]), hinted]);
    let mut at = |zone| run.apply(&[here(zone)]).view()["10.96.0.1:80/TCP"].clone();
    assert_eq!(at(Some("b")), "10.0.0.2:8080");
    assert_eq!(at(Some("a")), "10.0.0.1:8080");
    assert_eq!(at(Some("c")), "10.0.0.1:8080 10.0.0.2:8080");
    assert_eq!(at(Some("b")), "10.0.0.2:8080");
    assert_eq!(at(None), "10.0.0.1:8080 10.0.0.2:8080");
}

#[test]
fn where_there_is_little_room_one_slot_a_backend_does() {
    let maps = FakeMaps::new(Sizes { slots: 16, ..SIZES }, Search::EveryWrite);
    let now = Instant::now();
    let mut run = Run { it: Reconciler::restore(maps, &config(), now).unwrap(), now };
    run.it.synced();
    run.apply(&[
        service("a", &["10.96.0.1"], &["http:80/30001"]),
        slice("a-1", "a", &["10.0.0.1", "10.0.0.2"]),
    ]);
    run.apply(&[
        service("b", &["10.96.0.2"], &["http:80/30002"]),
        slice("b-1", "b", &["10.0.0.3", "10.0.0.4"]),
    ]);
    let maglev =
        |run: &Run, port| row(run, "0.0.0.0", port, FrontendKey::EXTERNAL).flags & Frontend::MAGLEV != 0;
    assert!(maglev(&run, 30001) && !maglev(&run, 30002));
    assert_eq!(run.view()["0.0.0.0:30002/TCP"], "10.0.0.3:8080 10.0.0.4:8080");
    assert_eq!(run.stats().slots, 2 + 7 + 2, "and that one is shared with the cluster IP");
}
