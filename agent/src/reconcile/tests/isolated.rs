//! Pods that policies isolate: when the programs are told to ask, and what of before goes on.

use ferroflow_common::abi::node::Settings;
use ferroflow_common::abi::policy::EndpointPolicy;

use super::*;
use crate::events::Reason;
use crate::maps::SettingsRow;
use crate::model::Labels;
use crate::model::label::{Requirement, Selector};
use crate::model::policy::{Live, PolicyPort, PortNumber, Rule};
use crate::model::{NetworkPolicy, Tenant};

fn pod(pod: &str, ips: &[&str]) -> Change {
    let addresses = ips.iter().map(|ip| addr(ip)).collect();
    let object = Pod { uid: "u1".into(), node: "here".into(), addresses, ..Pod::default() };
    Change::Pod(name(pod), Some(object))
}

/// Lets nothing in.
fn closes(policy: &str) -> Change {
    let (pods, ingress) = (Selector::default(), Some([].into()));
    Change::NetworkPolicy(name(policy), Some(NetworkPolicy { pods, ingress, ..NetworkPolicy::default() }))
}

impl Run {
    fn enforces(&self) -> bool {
        self.it.maps().read::<SettingsRow>(0).unwrap().flags & Settings::POLICIES != 0
    }

    fn policy(&self, ip: &str) -> EndpointPolicy {
        let rows = self.it.maps().dump::<Endpoints>().unwrap();
        rows.into_iter().find(|(at, _)| *at == addr(ip)).unwrap().1.policy
    }
}

#[test]
fn the_programs_ask_as_long_as_a_policy_applies_to_a_pod() {
    let mut run = Run::new();
    run.apply(&[pod("a", &["10.0.0.1"]), Change::LocalRoute(addr("10.0.0.1"), Some(7))]);
    assert!(!run.enforces());
    run.apply(&[closes("deny")]);
    assert!(run.enforces());
    let mut run = Run::restart(run.it.maps().clone());
    run.handle(&[pod("a", &["10.0.0.1"]), Change::LocalRoute(addr("10.0.0.1"), Some(7)), closes("deny")]);
    run.it.synced();
    run.settle();
    assert!(run.enforces(), "nor does a restart change that");
    run.apply(&[Change::NetworkPolicy(name("deny"), None)]);
    assert!(!run.enforces());
}

#[test]
fn rule_52_only_a_pod_that_was_open_adopts() {
    let mut run = Run::new();
    run.apply(&[pod("a", &["10.0.0.1"]), Change::LocalRoute(addr("10.0.0.1"), Some(7)), closes("deny")]);
    assert_eq!(run.policy("10.0.0.1").adopts_until, 0);
    run.apply(&[Change::NetworkPolicy(name("deny"), None)]);
    assert_eq!(run.policy("10.0.0.1"), EndpointPolicy::default());
    run.apply(&[closes("deny")]);
    let until = SECONDS + EndpointPolicy::ADOPTION;
    assert_eq!(run.policy("10.0.0.1").adopts_until, until);
    run.apply(&[closes("another")]);
    assert_eq!(run.policy("10.0.0.1").adopts_until, until, "it was isolated by then");
    run.apply(&[Change::LocalRoute(addr("10.0.0.1"), Some(8))]);
    assert_eq!(run.policy("10.0.0.1").adopts_until, 0, "another pod");
}

#[test]
fn rule_54_a_pod_of_which_only_the_name_is_known_is_closed_where_policies_may_mean_it() {
    let mut run = Run::new();
    let ip = "10.0.0.1";
    let tenant = Tenant { pod: name("a"), uid: "u1".into() };
    run.apply(&[Change::Attachment(addr(ip), Some(7)), Change::Tenant(addr(ip), Some(tenant))]);
    assert!(run.it.is_guarded(addr(ip)), "nothing may mean it");
    assert_eq!(run.policy(ip), EndpointPolicy::default());
    run.apply(&[closes("deny")]);
    assert!(!run.it.is_guarded(addr(ip)));
    assert_eq!(
        (run.policy(ip).ingress, run.policy(ip).egress),
        (EndpointPolicy::CLOSED, EndpointPolicy::CLOSED)
    );
    // Its object does not say the address yet.
    run.apply(&[pod("a", &[])]);
    assert!(run.it.is_guarded(addr(ip)));
    assert_eq!(run.policy(ip).egress, EndpointPolicy::OPEN);
    assert!(![EndpointPolicy::OPEN, EndpointPolicy::CLOSED].contains(&run.policy(ip).ingress));
}

/// The same, and live flows are to be cut.
fn cuts(policy: &str) -> Change {
    let Change::NetworkPolicy(name, Some(policy)) = closes(policy) else { panic!("a policy") };
    Change::NetworkPolicy(name, Some(NetworkPolicy { live: Some(Live::Cut), ..policy }))
}

#[test]
fn rule_52_programs_are_told_to_judge_live_flows_again_where_they_are_cut() {
    let epoch = |run: &Run| run.it.maps().read::<SettingsRow>(0).unwrap().epoch;
    let mut run = Run::new();
    let ip = "10.0.0.1";
    run.apply(&[pod("a", &[ip]), Change::LocalRoute(addr(ip), Some(7)), closes("deny")]);
    run.apply(&[Change::NetworkPolicy(name("deny"), None)]);
    run.apply(&[closes("deny")]);
    assert_eq!((epoch(&run), run.policy(ip).live), (0, EndpointPolicy::FINISH));
    run.apply(&[cuts("deny")]);
    let first = epoch(&run);
    assert!(first > 0);
    assert_eq!((run.policy(ip).live, run.policy(ip).adopts_until), (EndpointPolicy::CUT, 0));
    run.apply(&[pod("b", &["10.0.0.2"])]);
    assert_eq!(epoch(&run), first, "nothing that policies say has changed");
    run.apply(&[closes("another")]);
    let second = epoch(&run);
    assert!(second > first);
    let mut run = Run::restart(run.it.maps().clone());
    run.handle(&[pod("a", &[ip]), Change::LocalRoute(addr(ip), Some(7)), cuts("deny"), closes("another")]);
    run.it.synced();
    run.settle();
    assert!(epoch(&run) > second, "the agent before may have died before it told");
    run.apply(&[
        service("web", &["10.96.0.1"], &["http:80"]),
        Change::LocalAddress(addr("10.9.9.9"), Some(2)),
    ]);
    let third = epoch(&run);
    run.apply(&[closes("deny")]);
    assert_eq!((epoch(&run), run.policy(ip).live), (third, EndpointPolicy::FINISH), "it is cut no more");
}

/// A pod with a label, and a policy about such pods that lets in these ports.
fn labelled(app: &str, ip: &str) -> [Change; 2] {
    let labels = Labels::new([("app", app)]);
    let addresses = Box::new([addr(ip)]);
    let object = Pod { uid: "u1".into(), node: "here".into(), addresses, labels, ..Pod::default() };
    [Change::Pod(name(app), Some(object)), Change::LocalRoute(addr(ip), Some(7))]
}

fn lets_in(policy: &str, app: &str, ports: impl Iterator<Item = u16>) -> Change {
    let port = |number| {
        let number = PortNumber::Range(Port::new(number), Port::new(number));
        PolicyPort { proto: Proto::TCP, number }
    };
    let rule = Rule { peers: Box::default(), ports: ports.map(port).collect() };
    let pods = Selector::new([Requirement::equals("app", app)]);
    let ingress = Some([rule].into());
    Change::NetworkPolicy(name(policy), Some(NetworkPolicy { pods, ingress, ..NetworkPolicy::default() }))
}

#[test]
fn a_policy_that_exceeds_the_tables_closes_its_pods_alone_and_is_told_on_the_object() {
    let mut run = Run::new();
    let every_other = (0..2_500).map(|it| it * 2 + 1);
    run.handle(&labelled("a", "10.0.0.1")).handle(&labelled("b", "10.0.0.2"));
    run.handle(&[lets_in("huge", "a", every_other), lets_in("small", "b", 80..82)]).settle();
    assert_eq!(run.policy("10.0.0.1").ingress, EndpointPolicy::CLOSED);
    let other = run.policy("10.0.0.2").ingress;
    assert!(![EndpointPolicy::OPEN, EndpointPolicy::CLOSED].contains(&other));
    let notes = run.it.take_notes();
    let note = notes.first().expect("a note");
    assert_eq!(
        (notes.len(), note.object.to_string(), note.reason),
        (1, "NetworkPolicy default/huge".into(), Reason::PolicyOverflow)
    );
    assert!(note.message.contains("10.0.0.1") && note.message.contains("port_ranges"), "{}", note.message);
    run.apply(&[lets_in("huge", "a", 80..83)]);
    assert!(![EndpointPolicy::OPEN, EndpointPolicy::CLOSED].contains(&run.policy("10.0.0.1").ingress));
}
