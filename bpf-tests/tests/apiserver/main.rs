//! The Kubernetes source against an API server that misbehaves: after every fault the agent knows what it would know
//! from a directory of the same manifests.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "what helps a test fails as the test does")]

mod fixture;

use std::time::Duration;

use bpf_tests::apiserver::{ApiServer, Fault, Verb};
use ferroflow::{
    events::{Reason, Recorder},
    model::Name,
    watch::kube::{Access, KubeSource, Network, Readiness, Timing},
};

use fixture::{Fixture, TIMING, cluster, connect, member, of_directory};

#[tokio::test]
async fn a_cluster_is_listed_in_pages_and_watched() {
    let it = Fixture::start(&cluster(1_203, 0), TIMING, |_| {}).await;
    let heard = it.arrives_at(&cluster(1_203, 0)).await;
    assert_eq!((heard.changes, heard.losses, heard.problems.len()), (4 * 1_203, 0, 0));
    assert_eq!(it.requests(Verb::List, "/services"), 3, "pages of 500");
    it.api.set(&cluster(1_200, 1)).unwrap();
    it.arrives_at(&cluster(1_200, 1)).await;
    assert_eq!(it.requests(Verb::List, "/services"), 3, "no list after the first");
    assert_eq!(it.requests(Verb::Watch, ""), 8, "one watch a kind");
}

#[tokio::test]
async fn pods_that_are_finished_or_of_the_host_are_not_asked_for() {
    let mut manifests = cluster(2, 0);
    let it = Fixture::synced(&manifests).await;
    manifests[1] = manifests[1].replace("phase: Running", "phase: Succeeded");
    it.api.set(&manifests).unwrap();
    let heard = it.arrives_at(&manifests).await;
    assert_eq!(heard.model.pods.len(), 1);
    manifests[1] = cluster(2, 0)[1].replace("spec: {nodeName", "spec: {hostNetwork: true, nodeName");
    let changes = heard.changes;
    it.api.set(&manifests).unwrap();
    it.api.set(&cluster(3, 0)).unwrap();
    let heard = it.arrives_at(&cluster(3, 0)).await;
    assert_eq!(heard.changes, changes + 1 + 4, "a pod is back, and four objects are new");
}

/// API servers before 1.33 have no ServiceCIDR.
#[tokio::test]
async fn a_kind_that_the_api_does_not_have_keeps_nothing_waiting() {
    let manifests = cluster(3, 0);
    let it = Fixture::start(&manifests, TIMING, |api| {
        api.inject(Verb::List, "/servicecidrs", Fault::Status(404, None), usize::MAX);
    })
    .await;
    let heard = it.arrives_at(&manifests).await;
    assert_eq!((heard.losses, heard.problems.len()), (0, 0));
}

#[tokio::test]
async fn policies_namespaces_and_service_ranges_arrive() {
    let mut manifests = cluster(1, 0);
    manifests.push(POLICIES.to_owned());
    let it = Fixture::start(&manifests, TIMING, |_| {}).await;
    let model = it.arrives_at(&manifests).await.model;
    assert_eq!((model.namespaces.len(), model.policies.len(), model.ranges.len()), (1, 1, 1));
    assert_eq!(model.cluster_policies.len(), 1);
}

/// Somebody defines ClusterNetworkPolicies while the agent runs.
#[tokio::test]
async fn a_kind_that_is_defined_later_is_watched_from_then_on() {
    let (before, mut after) = (cluster(1, 0), cluster(1, 0));
    after.push(POLICIES.to_owned());
    let it = Fixture::start(&before, TIMING, |api| {
        api.inject(Verb::List, "/clusternetworkpolicies", Fault::Status(404, None), usize::MAX);
    })
    .await;
    let heard = it.arrives_at(&before).await;
    assert_eq!((heard.losses, heard.problems.len()), (0, 0));
    it.api.disarm();
    it.api.set(&after).unwrap();
    let heard = it.arrives_at(&after).await;
    assert_eq!((heard.model.cluster_policies.len(), heard.losses), (1, 0));
}

const POLICIES: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {}, policyTypes: [Ingress]}
---
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: [10.96.0.0/16]}
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: first}
spec:
  tier: Admin
  priority: 10
  subject: {namespaces: {}}
  ingress:
  - {action: Deny, from: [{namespaces: {matchLabels: {team: a}}}]}
";

/// Each fault on the first list of every kind, and on a later page.
#[tokio::test]
async fn a_fault_in_a_list_costs_a_retry_and_nothing_else() {
    let (manifests, later) = (cluster(600, 0), cluster(599, 1));
    let (model, later_model) = (of_directory(&manifests).await, of_directory(&later).await);
    for fault in [
        Fault::Status(500, None),
        Fault::Status(503, Some(0)),
        Fault::Status(403, None),
        Fault::Status(410, None),
        Fault::Cut(0),
        Fault::Cut(10),
        Fault::Cut(3_000),
        Fault::Garbage(0),
        Fault::Garbage(2_000),
        Fault::Slow(Duration::from_micros(10)),
    ] {
        let it = Fixture::start(&manifests, TIMING, |api| {
            for path in ["/services", "/endpointslices", "/nodes", "/pods"] {
                api.inject(Verb::List, path, fault.clone(), 2);
            }
        })
        .await;
        it.arrives(&model).await;
        assert_eq!(it.api.armed(), 0, "{fault:?}");
        it.api.set(&later).unwrap();
        it.arrives(&later_model).await;
    }
}

#[tokio::test]
async fn a_fault_in_a_watch_goes_on_from_the_last_version() {
    for fault in [
        Fault::Status(500, None),
        Fault::Status(429, Some(0)),
        Fault::Cut(0),
        Fault::Cut(1_000),
        Fault::Slow(Duration::from_micros(10)),
    ] {
        let it = Fixture::start(&cluster(20, 0), TIMING, |api| {
            api.inject(Verb::Watch, "", fault.clone(), 8);
        })
        .await;
        for generation in 1..10 {
            it.api.set(&cluster(20 - usize::from(generation), generation)).unwrap();
            it.arrives_at(&cluster(20 - usize::from(generation), generation)).await;
        }
        it.api.set(&cluster(3, 99)).unwrap();
        it.arrives_at(&cluster(3, 99)).await;
        assert_eq!(it.requests(Verb::List, "/services"), 1, "{fault:?}: the watch goes on");
    }
}

#[tokio::test]
async fn a_version_that_is_too_old_is_listed_again_and_what_went_meanwhile_is_gone() {
    for fault in [Fault::Status(410, None), Fault::ExpiredEvent] {
        let mut it = Fixture::synced(&cluster(700, 0)).await;
        it.api.go_away();
        it.api.set(&cluster(300, 1)).unwrap();
        it.api.compact();
        it.api.inject(Verb::Watch, "", fault.clone(), 4);
        it.api.come_back().unwrap();
        let heard = it.arrives_at(&cluster(300, 1)).await;
        assert!(it.requests(Verb::List, "/services") > 2, "{fault:?}");
        // 700 of each kind; 400 that went; of the 300 that stayed services and slices changed.
        assert_eq!(heard.changes, 4 * 700 + 4 * 400 + 2 * 300, "{fault:?}: only what changed is said again");
    }
}

#[tokio::test]
async fn a_watch_that_makes_no_sense_is_begun_anew() {
    let it = Fixture::synced(&cluster(5, 0)).await;
    for after in [0, 200, 700] {
        it.api.inject(Verb::Watch, "/services", Fault::Garbage(after), 7);
        it.api.inject(Verb::Watch, "/pods", Fault::Garbage(after), 7);
    }
    // Ends the watches that run: they see nothing of it.
    let mut it = it;
    it.api.go_away();
    it.api.come_back().unwrap();
    for generation in 1..20 {
        it.api.set(&cluster(5 + usize::from(generation), generation)).unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    it.arrives_at(&cluster(24, 19)).await;
}

#[tokio::test]
async fn a_server_that_hangs_is_left_alone_and_asked_again() {
    let timing = Timing { patience: Duration::from_millis(300), ..TIMING };
    for fault in [Fault::Hang, Fault::HangInBody] {
        let it = Fixture::start(&cluster(5, 0), timing, |api| {
            api.inject(Verb::List, "", fault.clone(), 6);
        })
        .await;
        it.arrives_at(&cluster(5, 0)).await;
        assert_eq!(it.api.armed(), 0, "{fault:?}");
    }
}

#[tokio::test]
async fn a_watch_that_is_silent_is_taken_to_be_dead() {
    let timing = Timing { idle: Duration::from_millis(300), ..TIMING };
    let it = Fixture::start(&cluster(5, 0), timing, |api| {
        api.inject(Verb::Watch, "", Fault::HangInBody, 8);
    })
    .await;
    it.source.until("the first list", |heard| heard.synced == 1).await;
    it.api.set(&cluster(4, 1)).unwrap();
    it.arrives_at(&cluster(4, 1)).await;
    assert_eq!(it.requests(Verb::List, "/services"), 1);
}

#[tokio::test]
async fn retry_after_is_kept() {
    let it = Fixture::start(&cluster(1, 0), TIMING, |api| {
        api.inject(Verb::List, "/services", Fault::Status(429, Some(2)), 1);
    })
    .await;
    let start = std::time::Instant::now();
    it.arrives_at(&cluster(1, 0)).await;
    assert!(start.elapsed() >= Duration::from_secs(2) - Duration::from_millis(500), "{:?}", start.elapsed());
}

#[tokio::test]
async fn an_api_server_that_is_away_loses_nothing_and_is_said_to_be_away() {
    let mut it = Fixture::synced(&cluster(30, 0)).await;
    it.api.go_away();
    let heard = it.source.until("the loss", |heard| heard.lost).await;
    assert_eq!(heard.model.services.len(), 30);
    it.api.set(&cluster(20, 1)).unwrap();
    // Many retries later nothing has changed.
    tokio::time::sleep(TIMING.last_retry * 5).await;
    assert_eq!(it.source.heard(), heard);
    it.api.come_back().unwrap();
    let heard = it.arrives_at(&cluster(20, 1)).await;
    assert_eq!(heard.losses, 1);
    assert_eq!(it.requests(Verb::List, "/services"), 1, "the watch went on from its version");
}

#[tokio::test]
async fn a_source_that_starts_without_an_api_waits_for_it() {
    let mut api = ApiServer::start().unwrap();
    api.go_away();
    api.set(&cluster(3, 0)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let source = connect(&api, dir.path(), Vec::new(), TIMING).await;
    let heard = source.until("the loss", |heard| heard.lost).await;
    assert_eq!((heard.synced, heard.changes), (0, 0));
    api.come_back().unwrap();
    Fixture { api, dir, source }.arrives_at(&cluster(3, 0)).await;
}

#[tokio::test]
async fn of_several_api_servers_one_that_answers_is_asked() {
    let mut apis = [ApiServer::start().unwrap(), ApiServer::start().unwrap(), ApiServer::start().unwrap()];
    apis[0].go_away();
    for api in &apis {
        api.set(&cluster(10, 0)).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let urls = apis.iter().map(ApiServer::url).collect();
    let source = connect(&apis[0], dir.path(), urls, TIMING).await;
    let expected = of_directory(&cluster(10, 0)).await;
    source.until("the second", |heard| heard.model == expected && heard.synced == 1).await;
    // One that is wrong in itself is left, too.
    apis[1].inject(Verb::List, "", Fault::Status(500, None), usize::MAX);
    apis[1].inject(Verb::Watch, "", Fault::Status(500, None), usize::MAX);
    apis[1].go_away();
    for api in &apis {
        api.set(&cluster(9, 1)).unwrap();
    }
    apis[1].come_back().unwrap();
    let expected = of_directory(&cluster(9, 1)).await;
    source.until("the third", |heard| heard.model == expected && !heard.lost).await;
}

#[tokio::test]
async fn a_token_that_expired_is_read_again() {
    let it = Fixture::start(&cluster(3, 0), TIMING, |api| api.require_token("first")).await;
    it.arrives_at(&cluster(3, 0)).await;
    it.api.require_token("second");
    let mut it = it;
    it.api.go_away();
    it.api.set(&cluster(2, 1)).unwrap();
    it.api.come_back().unwrap();
    it.source.until("the refusal", |heard| heard.lost).await;
    std::fs::write(it.dir.path().join("token"), "second").unwrap();
    it.arrives_at(&cluster(2, 1)).await;
}

#[tokio::test]
async fn a_bad_object_is_named_and_keeps_its_old_version() {
    let mut manifests = cluster(3, 0);
    let it = Fixture::synced(&manifests).await;
    manifests[1] = manifests[1].replacen("port: 1000", "port: 70000", 1);
    manifests[2] = member(2, 7);
    it.api.set(&manifests).unwrap();
    let heard = it.source.until("the problem", |heard| !heard.problems.is_empty()).await;
    assert_eq!(heard.problems, ["Service default/s1: spec.ports[0].port: 70000 is not a port (1-65535)"]);
    let mut expected = cluster(2, 0);
    expected.push(member(2, 7));
    it.arrives_at(&expected).await;
    // Also in a list, where the others of the page are in force.
    it.api.compact();
    it.api.inject(Verb::Watch, "", Fault::ExpiredEvent, 4);
    let mut it = it;
    it.api.go_away();
    it.api.come_back().unwrap();
    it.spent().await;
    let heard = it.arrives_at(&expected).await;
    assert_eq!(heard.problems.len(), 1);
    it.api.set(&cluster(1, 0)).unwrap();
    let heard = it.arrives_at(&cluster(1, 0)).await;
    assert_eq!(heard.problems, [""; 0], "a bad object that is deleted is no problem any more");
}

#[tokio::test]
async fn bookmarks_keep_a_quiet_watch_from_growing_old() {
    for bookmarks in [true, false] {
        let it = Fixture::synced(&cluster(3, 0)).await;
        if !bookmarks {
            it.api.without_bookmarks();
        }
        for _ in 0..5 {
            it.api.advance();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        it.api.compact();
        let lists = it.requests(Verb::List, "");
        let mut it = it;
        it.api.go_away();
        it.api.come_back().unwrap();
        it.api.set(&cluster(2, 1)).unwrap();
        it.arrives_at(&cluster(2, 1)).await;
        assert_eq!(it.requests(Verb::List, "") == lists, bookmarks, "listed again only without them");
    }
}

#[tokio::test]
async fn what_is_noted_becomes_an_event_on_the_object() {
    let it = Fixture::start(&cluster(1, 0), TIMING, |api| {
        api.inject(Verb::Write, "/events", Fault::Status(500, None), 1);
    })
    .await;
    let access = Access { kubeconfig: Some(it.dir.path().join("kubeconfig")), servers: Vec::new() };
    let source = KubeSource::open(access, "n1", TIMING).await.unwrap();
    let (recorder, notes) = Recorder::new();
    tokio::spawn(source.post(notes));
    for _ in 0..5 {
        let message = "10.96.0.1 port 80/TCP belongs to Service default/other";
        recorder.note_service(&Name::new("default", "s0"), Reason::ServiceConflict, message);
    }
    it.source.until("the events", |_| it.requests(Verb::Write, "") >= 3).await;
    let requests = it.api.requests();
    let written: Vec<_> = requests.iter().filter(|request| request.verb == Verb::Write).collect();
    let (refused, created, patched) = (written[0], written[1], written[2]);
    assert_eq!(created.path, "/apis/events.k8s.io/v1/namespaces/default/events");
    assert_eq!(
        (&refused.method, &created.method, &patched.method),
        (&"POST".into(), &"POST".into(), &"PATCH".into())
    );
    let text =
        |pointer: &str| created.body.pointer(pointer).and_then(|value| value.as_str()).unwrap_or_default();
    assert_eq!(text("/reason"), "ServiceConflict");
    assert_eq!(text("/type"), "Warning");
    assert_eq!(text("/note"), "10.96.0.1 port 80/TCP belongs to Service default/other");
    assert_eq!(text("/reportingInstance"), "ferroflow-n1");
    assert_eq!((text("/regarding/kind"), text("/regarding/name")), ("Service", "s0"));
    assert_eq!((text("/regarding/apiVersion"), text("/regarding/uid")), ("v1", "uid-of-s0"));
    assert_eq!(
        refused.body["metadata"]["name"], created.body["metadata"]["name"],
        "the same event, tried again"
    );
    assert_eq!(patched.path, format!("{}/{}", created.path, text("/metadata/name")));
    assert_eq!(patched.body.pointer("/series/count"), Some(&2.into()));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(it.requests(Verb::Write, ""), 3, "the rest of the series only counts");
}

#[tokio::test]
async fn rule_62_a_node_that_is_served_is_said_to_have_its_network() {
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n\
                spec: {taints: [{key: example.com/startup, effect: NoSchedule}, {key: other, effect: NoExecute}]}\n";
    let it = Fixture::start(&[node.to_owned()], TIMING, |api| {
        api.inject(Verb::Write, "/status", Fault::Status(500, None), 1);
        api.inject(Verb::Write, "/n1", Fault::Status(409, None), 1);
    })
    .await;
    let access = Access { kubeconfig: Some(it.dir.path().join("kubeconfig")), servers: Vec::new() };
    let source = KubeSource::open(access, "n1", TIMING).await.unwrap();
    source.announce(Readiness { startup_taint: Some("other".into()), network: Network::Ours }).await;
    let requests = it.api.requests();
    let done =
        |path: &str| requests.iter().rfind(|request| request.verb == Verb::Write && request.path == path);
    let status = done("/api/v1/nodes/n1/status").unwrap();
    assert_eq!(status.body["status"]["conditions"][0]["type"], "NetworkUnavailable");
    assert_eq!(status.body["status"]["conditions"][0]["status"], "False");
    let spec = done("/api/v1/nodes/n1").unwrap();
    assert_eq!(spec.body["spec"]["taints"].as_array().unwrap().len(), 1);
    assert_eq!(spec.body["spec"]["taints"][0]["key"], "example.com/startup");
    assert_eq!(it.requests(Verb::Write, "/n1"), 2, "tried again after the conflict");
}

#[tokio::test]
async fn a_certificate_is_checked_against_the_authority_and_the_address() {
    for (name, trusted) in [("127.0.0.1", true), ("192.0.2.1", false)] {
        let api = ApiServer::start_with_tls(name).unwrap();
        api.set(&cluster(3, 0)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let source = connect(&api, dir.path(), Vec::new(), TIMING).await;
        let heard = source.until("an end", |heard| heard.synced == 1 || heard.lost).await;
        assert_eq!((heard.synced == 1, api.requests().is_empty()), (trusted, !trusted), "{name}");
    }
}

/// Faults of every kind at random, while the cluster changes.
#[tokio::test]
async fn after_any_mixture_of_faults_the_model_is_that_of_the_directory() {
    let mut it = Fixture::synced(&cluster(40, 0)).await;
    let faults = [
        Fault::Status(500, None),
        Fault::Status(410, None),
        Fault::Status(429, Some(0)),
        Fault::ExpiredEvent,
        Fault::Cut(500),
        Fault::Garbage(300),
        Fault::Slow(Duration::from_micros(5)),
    ];
    // A fixed sequence (Numerical Recipes' generator), so that a failure can be repeated.
    let mut random = 7_u32;
    let mut next = |below: usize| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 16) as usize % below
    };
    for generation in 1..60 {
        let verb = if next(2) == 0 { Verb::List } else { Verb::Watch };
        let path = ["/services", "/endpointslices", "/nodes", "/pods"][next(4)];
        it.api.inject(verb, path, faults[next(faults.len())].clone(), 1 + next(3));
        match next(8) {
            0 => {
                it.api.go_away();
                it.api.set(&cluster(next(60), generation)).unwrap();
                if next(2) == 0 {
                    it.api.compact();
                }
                it.api.come_back().unwrap();
            }
            1 => it.api.compact(),
            _ => it.api.set(&cluster(next(60), generation)).unwrap(),
        }
        tokio::time::sleep(Duration::from_millis(next(30) as u64)).await;
    }
    it.api.disarm();
    it.api.set(&cluster(33, 99)).unwrap();
    let heard = it.arrives_at(&cluster(33, 99)).await;
    assert_eq!(heard.problems, [""; 0]);
}
