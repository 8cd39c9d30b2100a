//! The commands over a network of maps and a daemon that does as it is told, or does not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Mutex;

use ferroflow_common::addr::Addr;
use tempfile::TempDir;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::order::{Readiness, Refused, View};
use super::*;
use crate::cni::protocol::{Addresses, Attached, Attachment, Removal};
use crate::cni::spool;
use crate::ipam::host_port::{HostPort, Transport};
use crate::ipam::{Lease, Owner, Tenant};
use crate::model::Prefix;
use crate::net::fake::Fake;
use crate::net::queue::Limits;

/// One agent after the other on one machine.
struct Node {
    state: TempDir,
    netlink: Arc<Fake>,
    rows: Arc<Mutex<BTreeMap<Addr, u32>>>,
    view: View,
    serving: Serving,
}

impl Node {
    fn new(ranges: &[&str]) -> Self {
        let range = |text: &&str| {
            let (addr, bits) = text.split_once('/').unwrap();
            Prefix::new(addr.parse::<IpAddr>().unwrap().into(), bits.parse().unwrap()).unwrap()
        };
        Self {
            state: tempfile::tempdir().unwrap(),
            netlink: Arc::new(Fake::default()),
            rows: Arc::default(),
            view: View {
                readiness: Readiness::Ready,
                ranges: ranges.iter().map(range).collect(),
                ..View::default()
            },
            serving: Serving::AtOnce,
        }
    }

    /// A new agent, on what is there; the one before is gone, however it ended.
    fn agent(&self) -> Attachments {
        let (orders, asked) = unbounded_channel();
        tokio::spawn(daemon(asked, self.view.clone(), self.rows.clone(), self.serving));
        let ledger = Ledger::open(self.state.path());
        Attachments::new(self.state.path().into(), ledger, self.netlink.clone(), orders)
    }

    fn pod(&self, id: &str) -> Attachment {
        Attachment { netns: self.netlink.netns(&format!("/run/netns/{id}")), ..attachment(id) }
    }

    fn leases(&self) -> Vec<(Owner, Lease)> {
        let ledger = Ledger::open(self.state.path()).unwrap();
        ledger.look(|pool| pool.leases().map(|(owner, lease)| (owner.clone(), lease.clone())).collect())
    }

    fn links(&self) -> usize {
        self.netlink.state().links.len()
    }

    fn rows(&self) -> usize {
        self.rows.lock().unwrap().len()
    }

    /// Leases, links and rows.
    fn left(&self) -> (usize, usize, usize) {
        (self.leases().len(), self.links(), self.rows())
    }
}

/// When pods get their rows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Serving {
    AtOnce,
    Never,
    /// A port of the host is a Service's.
    Refused,
}

async fn daemon(
    mut asked: UnboundedReceiver<Order>,
    view: View,
    rows: Arc<Mutex<BTreeMap<Addr, u32>>>,
    serving: Serving,
) {
    let mut waiting = Vec::new();
    while let Some(order) = asked.recv().await {
        match order {
            Order::Look(answer) => drop(answer.send(view.clone())),
            Order::Serve { place: _, served } if serving == Serving::Refused => {
                let _gone = served.send(Err(Refused("NodePort 80/TCP belongs to Service a/b".into())));
            }
            Order::Serve { place, served } if serving == Serving::AtOnce => {
                rows.lock().unwrap().extend(place.addresses.iter().map(|addr| (*addr, place.ifindex)));
                let _gone = served.send(Ok(()));
            }
            Order::Serve { place: _, served } => waiting.push(served),
            Order::IsServed { place, answer } => {
                let rows = rows.lock().unwrap();
                let served = place.addresses.iter().all(|addr| rows.get(addr) == Some(&place.ifindex));
                let _gone = answer.send(if served { Ok(()) } else { Err("no row".into()) });
            }
            Order::Withdraw { interface: _, addresses } => {
                rows.lock().unwrap().retain(|addr, _| !addresses.contains(addr));
            }
        }
    }
}

fn owner(id: &str) -> Owner {
    Owner { container_id: id.into(), ifname: "eth0".into() }
}

fn attachment(id: &str) -> Attachment {
    Attachment {
        owner: owner(id),
        netns: "/nowhere".into(),
        network: "net".into(),
        mtu: None,
        given: None,
        tenant: None,
        host_ports: Vec::new(),
        limits: Limits::default(),
    }
}

fn host_port(host_ip: &str, host_port: u16, protocol: Transport) -> HostPort {
    HostPort { host_ip: host_ip.parse().ok(), host_port, protocol, container_port: 80 }
}

fn addresses(attached: &Attached) -> Vec<String> {
    attached.addresses.iter().map(ToString::to_string).collect()
}

const RANGES: [&str; 2] = ["10.244.1.0/24", "fd00:1::/64"];

#[tokio::test]
async fn rule_54_add_answers_when_the_pod_is_served_and_del_leaves_nothing() {
    let node = Node::new(&RANGES);
    let agent = node.agent();
    let pod = node.pod("a");
    let attached = agent.add(&pod).await.unwrap();
    assert_eq!(addresses(&attached), ["10.244.1.2", "fd00:1::2"]);
    assert_eq!(node.left(), (1, 1, 2));
    assert_eq!(agent.check(&pod, &attached.addresses).await, Ok(()));
    for _ in 0..2 {
        assert_eq!(agent.del(&pod.owner).await, Ok(()));
        assert_eq!(node.left(), (0, 0, 0));
    }
    assert_eq!(agent.check(&pod, &attached.addresses).await.unwrap_err().code, Code::UNKNOWN_CONTAINER);
    assert_eq!(addresses(&agent.add(&node.pod("b")).await.unwrap()), ["10.244.1.3", "fd00:1::3"]);
}

#[tokio::test(start_paused = true)]
async fn rule_54_a_pod_that_is_not_served_is_not_attached() {
    let node = Node { serving: Serving::Never, ..Node::new(&RANGES) };
    let agent = node.agent();
    let error = agent.add(&node.pod("a")).await.unwrap_err();
    assert_eq!(error.code, Code::TRY_AGAIN_LATER);
    assert!(error.msg.contains("no row"), "what is missing is said: {error}");
    assert_eq!(node.left(), (0, 0, 0));
}

#[tokio::test]
async fn rule_54_the_next_agent_knows_whose_an_address_is() {
    let node = Node::new(&RANGES);
    let tenant = Tenant { namespace: "shop".into(), name: "web".into(), uid: "u1".into() };
    node.agent().add(&Attachment { tenant: Some(tenant.clone()), ..node.pod("a") }).await.unwrap();
    node.agent().add(&node.pod("b")).await.unwrap();
    let places = node.agent().take_over().await.unwrap();
    let tenants: Vec<_> = places.into_iter().map(|place| place.tenant).collect();
    assert_eq!(tenants, [Some(tenant), None]);
}

#[tokio::test]
async fn rule_55_what_fails_changes_nothing_and_names_the_reason() {
    let node = Node::new(&RANGES);
    let agent = node.agent();
    let code = |result: Result<Attached, CniError>| result.unwrap_err().code;
    assert_eq!(code(agent.add(&attachment("gone")).await), Code::UNKNOWN_CONTAINER);
    let pod = node.pod("a");
    node.netlink.state().namespaces.get_mut(&pod.netns).unwrap().insert("eth0".into());
    let error = agent.add(&pod).await.unwrap_err();
    assert!(error.code == Code::INVALID_ENVIRONMENT && error.msg.contains("CNI_IFNAME"), "{error}");
    node.netlink.state().refusal = Some("Operation not permitted".into());
    let error = agent.add(&node.pod("b")).await.unwrap_err();
    assert!(error.code == Code::WIRING && error.msg.contains("not permitted"), "{error}");
    assert_eq!(node.left(), (0, 0, 0));
    let pod = node.pod("c");
    let first = agent.add(&pod).await.unwrap();
    assert_eq!(code(agent.add(&pod).await), Code::INVALID_ENVIRONMENT, "it is no idempotent command");
    assert_eq!(agent.check(&pod, &first.addresses).await, Ok(()), "and changes nothing");
}

#[tokio::test]
async fn a_new_pod_gets_the_device_that_the_agent_is_told() {
    let node = Node::new(&RANGES);
    node.agent().add(&node.pod("a")).await.unwrap();
    let agent = node.agent().device(Kind::Netkit);
    agent.add(&node.pod("b")).await.unwrap();
    let first = agent.add(&node.pod("a")).await;
    assert!(first.is_err(), "it has a device");
    let kind = |id: &str| {
        let host = crate::net::pod::host_interface(&attachment(id).owner);
        node.netlink.state().links[&host].1.kind
    };
    assert_eq!([kind("a"), kind("b")], [Kind::Veth, Kind::Netkit]);
}

#[tokio::test]
async fn rule_58_status_is_that_of_the_next_add() {
    let unavailable = |result: Result<(), CniError>| {
        let error = result.unwrap_err();
        assert_eq!(error.code, Code::NOT_AVAILABLE);
        error.msg
    };
    let mut node = Node::new(&["10.0.0.0/30"]);
    let agent = node.agent();
    assert_eq!(agent.status(Addresses::Own).await, Ok(()));
    agent.add(&node.pod("a")).await.unwrap();
    assert!(
        unavailable(agent.status(Addresses::Own).await).contains("no IPv4 address is left in 10.0.0.0/30")
    );
    let error = agent.add(&node.pod("b")).await.unwrap_err();
    assert_eq!(error.code, Code::EXHAUSTED);
    assert_eq!(node.left(), (1, 1, 1));
    agent.del(&owner("a")).await.unwrap();
    assert_eq!(agent.status(Addresses::Own).await, Ok(()));
    node.view.ranges.clear();
    assert!(unavailable(node.agent().status(Addresses::Own).await).contains("spec.podCIDRs"));
    node.view.readiness = Readiness::Starting;
    unavailable(node.agent().status(Addresses::Own).await);
    assert_eq!(node.agent().add(&node.pod("b")).await.unwrap_err().code, Code::TRY_AGAIN_LATER);
}

#[tokio::test]
async fn rule_57_check_finds_what_changed() {
    let node = Node::new(&RANGES);
    let agent = node.agent();
    let pod = node.pod("a");
    let attached = agent.add(&pod).await.unwrap();
    let before = node.left();
    let other: Vec<IpAddr> = vec!["10.9.9.9".parse().unwrap()];
    assert_eq!(agent.check(&pod, &other).await.unwrap_err().code, Code::DIFFERENT);
    let row = node.rows.lock().unwrap().pop_first().unwrap();
    assert_eq!(agent.check(&pod, &attached.addresses).await.unwrap_err().code, Code::DIFFERENT);
    node.rows.lock().unwrap().insert(row.0, row.1);
    assert_eq!(agent.check(&pod, &attached.addresses).await, Ok(()));
    assert_eq!(node.left(), before);
    node.netlink.remove_netns(&pod.netns);
    assert_eq!(agent.check(&pod, &attached.addresses).await.unwrap_err().code, Code::DIFFERENT);
}

#[tokio::test]
async fn rule_59_gc_removes_what_is_not_valid_in_its_network_only() {
    let node = Node::new(&RANGES);
    let agent = node.agent();
    for id in ["a", "b", "c"] {
        agent.add(&node.pod(id)).await.unwrap();
    }
    let other = Attachment { network: "other".into(), ..node.pod("d") };
    agent.add(&other).await.unwrap();
    assert_eq!(agent.gc("net", &[owner("b"), owner("unknown")]).await, Ok(()));
    let left: Vec<_> = node.leases().into_iter().map(|(owner, _)| owner.container_id).collect();
    assert_eq!(left, ["b".into(), "d".into()]);
    assert_eq!(node.left(), (2, 2, 4));
}

#[tokio::test]
async fn rule_56_what_was_left_in_the_spool_is_done_and_no_later_pod_with_it() {
    let node = Node::new(&RANGES);
    let first = node.agent();
    for id in ["a", "b"] {
        first.add(&node.pod(id)).await.unwrap();
    }
    drop(first);
    for id in ["a", "unknown"] {
        spool::put(node.state.path(), &Removal { owner: owner(id) }).unwrap();
    }
    let agent = node.agent();
    let places = agent.take_over().await.unwrap();
    let left: Vec<_> = places.iter().map(|place| place.addresses.len()).collect();
    assert_eq!(left, [2], "the two addresses of b");
    assert_eq!((node.leases().len(), node.links()), (1, 1));
    assert_eq!(spool::list(node.state.path()).unwrap(), []);
    // The same container comes again before the agent looks into the spool.
    spool::put(node.state.path(), &Removal { owner: owner("b") }).unwrap();
    let again = agent.add(&node.pod("b")).await.unwrap();
    agent.replay().await;
    assert_eq!(agent.check(&node.pod("b"), &again.addresses).await, Ok(()));
}

#[tokio::test]
async fn leases_of_pods_that_are_gone_are_freed() {
    let node = Node::new(&RANGES);
    let agent = node.agent();
    let (a, b) = (node.pod("a"), node.pod("b"));
    agent.add(&a).await.unwrap();
    agent.add(&b).await.unwrap();
    node.netlink.remove_netns(&a.netns);
    agent.sweep().await;
    assert_eq!(node.left(), (1, 1, 2));
    // A reboot.
    node.netlink.remove_netns(&b.netns);
    assert_eq!(node.agent().take_over().await.unwrap(), []);
    assert!(node.leases().is_empty());
    assert_eq!(addresses(&node.agent().add(&node.pod("c")).await.unwrap()), ["10.244.1.4", "fd00:1::4"]);
}

#[tokio::test]
async fn a_ledger_that_cannot_be_read_gives_nothing_and_is_named() {
    let node = Node::new(&RANGES);
    node.agent().add(&node.pod("a")).await.unwrap();
    fs::write(node.state.path().join("leases.json"), "{").unwrap();
    let agent = node.agent();
    let error = agent.add(&node.pod("b")).await.unwrap_err();
    assert!(error.code == Code::IO && error.msg.contains("leases.json"), "{error}");
    assert_eq!(agent.status(Addresses::Own).await.unwrap_err().code, Code::NOT_AVAILABLE);
    assert!(agent.del(&owner("a")).await.is_err(), "the plugin leaves it in the spool");
    assert_eq!(agent.take_over().await.unwrap(), []);
}

#[tokio::test]
async fn many_at_once_have_an_address_each() {
    let node = Node::new(&RANGES);
    let agent = Arc::new(node.agent());
    let adding: Vec<_> = (0..100)
        .map(|number| {
            let (agent, pod) = (agent.clone(), node.pod(&format!("c{number}")));
            tokio::spawn(async move { agent.add(&pod).await })
        })
        .collect();
    let mut given = BTreeSet::new();
    for one in adding {
        given.extend(one.await.unwrap().unwrap().addresses);
    }
    assert_eq!((given.len(), node.left()), (200, (100, 100, 200)));
}

#[tokio::test]
async fn a_port_of_the_host_leads_to_one_pod_and_is_free_when_that_is_gone() {
    use Transport::{Tcp, Udp};
    let node = Node::new(&RANGES);
    let agent = node.agent();
    let asks = |id: &str, ports: &[HostPort]| Attachment { host_ports: ports.into(), ..node.pod(id) };
    let first = asks("a", &[host_port("", 80, Tcp), host_port("127.0.0.1", 81, Tcp)]);
    let added = agent.add(&first).await.unwrap();
    for taken in [host_port("", 80, Tcp), host_port("::", 80, Tcp), host_port("127.0.0.1", 81, Tcp)] {
        let error = agent.add(&asks("b", std::slice::from_ref(&taken))).await.unwrap_err();
        assert_eq!(error.code, Code::PORT_TAKEN);
        assert!(error.msg.contains(&taken.to_string()) && error.msg.contains("container a"), "{error}");
        assert_eq!(node.left(), (1, 1, 2));
    }
    let others = [host_port("", 80, Udp), host_port("127.0.0.1", 80, Tcp), host_port("10.0.0.1", 81, Tcp)];
    agent.add(&asks("c", &others)).await.unwrap();
    // Another agent knows them.
    let agent = node.agent();
    let places = agent.take_over().await.unwrap();
    assert_eq!(
        places.iter().map(|place| &*place.host_ports).collect::<Vec<_>>(),
        [&first.host_ports[..], &others]
    );
    assert_eq!(agent.check(&first, &added.addresses).await, Ok(()));
    let other = Attachment { host_ports: Vec::new(), ..first.clone() };
    let different = agent.check(&other, &added.addresses).await.unwrap_err();
    assert!(different.code == Code::DIFFERENT && different.msg.contains("hostPort 80/tcp"), "{different}");
    agent.del(&owner("a")).await.unwrap();
    agent.add(&asks("b", &first.host_ports)).await.unwrap();
    // Its namespace goes without a word.
    node.netlink.remove_netns(&asks("c", &[]).netns);
    agent.add(&asks("d", &others)).await.unwrap();
    assert_eq!(node.left().0, 2);
}

#[tokio::test]
async fn a_port_of_the_host_that_cannot_be_served_undoes_the_attachment() {
    let node = Node { serving: Serving::Refused, ..Node::new(&["10.244.1.0/24"]) };
    let asks = |port| Attachment { host_ports: vec![port], ..node.pod("a") };
    let error = node.agent().add(&asks(host_port("", 80, Transport::Tcp))).await.unwrap_err();
    assert!(error.code == Code::PORT_TAKEN && error.msg.contains("Service a/b"), "{error}");
    let error = node.agent().add(&asks(host_port("::1", 80, Transport::Tcp))).await.unwrap_err();
    assert!(error.code == Code::INVALID_CONFIG && error.msg.contains("no address of this family"), "{error}");
    assert_eq!(node.left(), (0, 0, 0));
}

#[tokio::test]
async fn a_ledger_without_ports_of_the_host_is_read() {
    let node = Node::new(&RANGES);
    node.agent().add(&node.pod("a")).await.unwrap();
    let text = fs::read_to_string(node.state.path().join("leases.json")).unwrap();
    assert!(!text.contains("host_ports") && text.contains("10.244.1.2"), "{text}");
    assert_eq!(node.leases()[0].1.host_ports, []);
}

#[tokio::test]
async fn addresses_that_another_plugin_gave_are_taken_and_no_two_pods_have_them() {
    let node = Node::new(&[]);
    let agent = node.agent();
    let given = |id: &str, addresses: &[&str]| {
        let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
        Attachment { given: Some(addresses), ..node.pod(id) }
    };
    assert_eq!(agent.status(Addresses::Given).await, Ok(()), "no range is needed");
    assert_eq!(agent.status(Addresses::Own).await.unwrap_err().code, Code::NOT_AVAILABLE);
    let first = given("a", &["10.77.0.2", "fd00:77::2"]);
    let attached = agent.add(&first).await.unwrap();
    assert_eq!(addresses(&attached), ["10.77.0.2", "fd00:77::2"]);
    assert_eq!(agent.check(&first, &attached.addresses).await, Ok(()));
    let error = agent.add(&given("b", &["10.77.0.2"])).await.unwrap_err();
    assert!(error.code == Code::IPAM && error.msg.contains("container a"), "{error}");
    assert_eq!(node.left(), (1, 1, 2));
    agent.del(&owner("a")).await.unwrap();
    let again = agent.add(&given("b", &["10.77.0.2"])).await.unwrap();
    assert_eq!(addresses(&again), ["10.77.0.2"], "it is not this agent's to let an address rest");
    assert_eq!(node.leases()[0].1.addresses, again.addresses);
}

/// Also without a place for the socket: the agent goes on.
#[tokio::test]
async fn without_directories_nothing_is_attached_and_the_reason_is_said() {
    let node = Node::new(&RANGES);
    let file = node.state.path().join("file");
    fs::write(&file, "").unwrap();
    let name = "05-ferroflow.conflist".into();
    let conflist = Conflist { dir: node.state.path().join("net.d"), name, ipam: None };
    let (socket, state_dir) = (file.join("cni.sock"), file.join("state"));
    let options = Options { socket, state_dir, conflist, device: Kind::Veth };
    let (orders, asked) = unbounded_channel();
    tokio::spawn(daemon(asked, node.view.clone(), node.rows.clone(), node.serving));
    let (server, attached) = Server::start(options, node.netlink.clone(), orders).await.unwrap();
    assert!(attached.is_empty() && server.listener.is_none());
    for refused in [
        server.attachments.status(Addresses::Own).await.unwrap_err(),
        server.attachments.add(&node.pod("a")).await.unwrap_err(),
    ] {
        assert!(refused.msg.contains("file/state") && refused.msg.contains("--state-dir"), "{refused}");
    }
    assert_eq!((node.links(), node.rows()), (0, 0));
}
