//! A restart while documents are bad: what worked before is not lost.

use super::*;

fn services(names: &[&str]) -> Withheld {
    Withheld::Some {
        services: names.iter().map(|text| name(text)).collect(),
        pods: BTreeSet::new(),
        nodes: false,
    }
}

/// The tables of `web`, `next` and a local pod; then a new agent.
fn restarted() -> (BTreeMap<String, String>, Run) {
    let mut run = Run::new();
    run.apply(&web());
    run.apply(&[service("next", &["10.96.0.2"], &["http:80"]), slice("next-1", "next", &["10.0.1.1"])]);
    let pod = Pod { node: "here".into(), addresses: Box::new([addr("10.244.1.5")]), ..Pod::default() };
    run.apply(&[Change::Pod(name("p"), Some(pod)), Change::LocalRoute(addr("10.244.1.5"), Some(7))]);
    let mut next = Run::restart(run.it.maps().clone());
    next.handle(&[Change::LocalRoute(addr("10.244.1.5"), Some(7))]);
    (run.view(), next)
}

#[test]
fn a_service_whose_document_is_bad_stays_until_it_is_good_or_gone() {
    for good in [false, true] {
        let (before, mut run) = restarted();
        let [_, endpoints] = web();
        run.it.hold(services(&["web"]), run.now);
        run.handle(&[endpoints]).it.synced();
        run.apply(&[]);
        assert_eq!(run.view().into_keys().collect::<Vec<_>>(), ["10.96.0.1:80/TCP"], "next is really gone");
        assert_eq!(run.view()["10.96.0.1:80/TCP"], before["10.96.0.1:80/TCP"]);
        assert_eq!(run.it.stats().pending, 0);
        // Something else is bad: this one still is.
        run.it.hold(services(&["web", "other"]), run.now);
        run.apply(&[]);
        assert_eq!(run.view().len(), 1);
        if good {
            run.apply(&[service("web", &["10.96.0.7"], &["http:80"])]);
            assert_eq!(run.view().len(), 1, "it is in force when the problem is taken back");
        }
        run.it.hold(Withheld::default(), run.now);
        run.apply(&[]);
        let left: Vec<_> = run.view().into_keys().collect();
        assert_eq!(left, if good { vec!["10.96.0.7:80/TCP".to_owned()] } else { vec![] });
    }
}

#[test]
fn a_service_of_which_a_slice_is_bad_keeps_its_backends() {
    let (before, mut run) = restarted();
    let [object, _] = web();
    run.it.hold(services(&["web"]), run.now);
    run.handle(&[object]).it.synced();
    run.apply(&[]);
    assert_eq!(run.view()["10.96.0.1:80/TCP"], before["10.96.0.1:80/TCP"]);
    run.it.hold(Withheld::default(), run.now);
    run.apply(&[slice("web-1", "web", &["10.0.0.9"])]);
    assert_eq!(run.view()["10.96.0.1:80/TCP"], "10.0.0.9:8080");
    // From here on the source remembers what it was.
    run.it.hold(services(&["web"]), run.now);
    run.apply(&[gone("web")]);
    assert_eq!(run.view().len(), 0);
}

#[test]
fn a_document_that_may_be_anything_keeps_all_that_is_missing() {
    let (before, mut run) = restarted();
    run.it.hold(Withheld::Any, run.now);
    let changed = slice("web-1", "web", &["10.0.0.9"]);
    run.handle(&[service("web", &["10.96.0.1"], &["http:80"]), changed]).it.synced();
    run.apply(&[]);
    assert_eq!(run.view()["10.96.0.1:80/TCP"], "10.0.0.9:8080", "what is known is served");
    assert_eq!(run.view()["10.96.0.2:80/TCP"], before["10.96.0.2:80/TCP"]);
    assert_eq!(run.stats().endpoints, 1, "the pod may be in it too");
    let mut without_interface = Run::restart(run.it.maps().clone());
    without_interface.it.hold(Withheld::Any, run.now);
    without_interface.it.synced();
    without_interface.apply(&[]);
    assert_eq!(without_interface.stats().endpoints, 0, "its interface is gone: so is the pod");
    run.it.hold(Withheld::default(), run.now);
    run.apply(&[]);
    assert_eq!((run.view().len(), run.stats().endpoints), (1, 0));
}

#[test]
fn what_is_held_keeps_its_address() {
    let (before, mut run) = restarted();
    run.it.hold(services(&["web"]), run.now);
    run.handle(&[service("able", &["10.96.0.1"], &["http:80"])]).it.synced();
    run.settle();
    assert_eq!(run.view()["10.96.0.1:80/TCP"], before["10.96.0.1:80/TCP"]);
    assert_eq!(run.errors().len(), 1);
    run.it.hold(Withheld::default(), run.now);
    run.settle();
    assert_eq!((run.errors().len(), &*run.view()["10.96.0.1:80/TCP"]), (0, "reject"));
}
