//! Pods that policies isolate: when the programs are told to ask, and what of before goes on.

use ferroflow_common::abi::node::Settings;
use ferroflow_common::abi::policy::EndpointPolicy;

use super::*;
use crate::maps::SettingsRow;
use crate::model::label::Selector;
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
